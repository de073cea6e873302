"""Checkpoints of the format `torch`, written by stock Megatron's own `save_checkpoint`.

Called as `python rank_file_cases.py RANK WORLD_SIZE PORT FOLDER NAME...` like `parallel_cases.py`, but by
one process: it is each rank of a case after the other, in process groups that send nothing. A trainer
loads its part of the model's Hugging Face folder, and what it holds is saved under the names of our
layers, of stock layers without TransformerEngine, or of those with it.
"""

import io
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.megatron_runs import start_trainer, trainer_config
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

ITERATION = 7
_SP = "--sequence-parallel"
_VPP2 = "--num-virtual-stages-per-pipeline-rank 2"


def _tp(size: int) -> str:
    return f"--tensor-model-parallel-size {size}"


def _pp(size: int) -> str:
    return f"--pipeline-model-parallel-size {size}"


def _ep(size: int, etp: int) -> str:
    return f"--expert-model-parallel-size {size} --expert-tensor-parallel-size {etp}"


@dataclass(frozen=True)
class Case:
    """One layout of one model.

    Attributes:
        model: name of the folder with the model.
        ranks: processes there would be.
        words: of the command line.
        layers: whose names the files have: `ours`, `local` (stock modules), or `te`, whose names stand in
            for those of modules that need CUDA.
    """

    model: str
    ranks: int
    words: str
    layers: str


CASES: dict[str, Case] = {
    "qwen3 tied, one rank, local": Case("qwen3", 1, "", "local"),
    "qwen3 tied, tp2 dp2, local": Case("qwen3", 4, _tp(2), "local"),
    "qwen3 tied, pp2 first 1, te": Case(
        "qwen3", 2, f"{_pp(2)} --decoder-first-pipeline-num-layers 1", "te"
    ),
    "qwen3 tied, tp2 pp2 vpp2, local": Case("qwen3", 4, f"{_tp(2)} {_pp(2)} {_VPP2}", "local"),
    "qwen3 untied, pp4, te": Case("qwen3_untied", 4, _pp(4), "te"),
    "qwen3 untied, tp2 cp2 pp2, te": Case(
        "qwen3_untied", 8, f"{_tp(2)} {_pp(2)} --context-parallel-size 2", "te"
    ),
    "qwen2, tp2, te": Case("qwen2", 2, _tp(2), "te"),
    "glm4, tp2, ours": Case("glm4", 2, _tp(2), "ours"),
    "qwen3_moe, ep2, local": Case("qwen3_moe", 2, _ep(2, 1), "local"),
    "qwen3_moe, tp2 etp2, te": Case("qwen3_moe", 2, f"{_tp(2)} {_SP}", "te"),
    "qwen3_moe, tp2 etp1 ep4, local": Case("qwen3_moe", 4, f"{_tp(2)} {_SP} {_ep(4, 1)}", "local"),
    "qwen3_moe, tp2 etp1, te": Case("qwen3_moe", 2, f"{_tp(2)} {_SP} {_ep(1, 1)}", "te"),
    "glm4_moe, ep2, ours": Case("glm4_moe", 2, _ep(2, 1), "ours"),
    "glm4_moe, pp2 vpp2 ep2, te": Case("glm4_moe", 4, f"{_pp(2)} {_VPP2} {_ep(2, 1)}", "te"),
    "glm4_moe, tp2 pp2 etp1 ep2, local": Case(
        "glm4_moe", 8, f"{_tp(2)} {_SP} {_pp(2)} {_ep(2, 1)}", "local"
    ),
    "deepseek_v3, tp4 etp2 ep2, te": Case("deepseek_v3", 4, f"{_tp(4)} {_SP} {_ep(2, 2)}", "te"),
    "deepseek_v3, tp4 etp1 ep2, ours": Case(
        "deepseek_v3", 4, f"{_tp(4)} {_SP} {_ep(2, 1)}", "ours"
    ),
}


# Stock layers saved as torch_dist, which is the same in every layout. Those that are all alike share their
# tensors there.
TORCH_DIST_CASES: dict[str, Case] = {
    "qwen3 as torch_dist": Case("qwen3", 1, "", "local"),
    "qwen3_moe as torch_dist": Case("qwen3_moe", 1, "", "local"),
    "qwen3_moe of equal layers as torch_dist": Case("qwen3_moe", 1, "", "local"),
    "glm4_moe as torch_dist": Case("glm4_moe", 1, "", "local"),
}


def checkpoint_of(folder: Path, name: str) -> Path:
    """Where a case saves."""
    return folder / f"{name.replace(' ', '_').replace(',', '')}.saved"


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Save the case's checkpoint, rank by rank."""
    from megatron.core import parallel_state

    case, save = CASES[name], checkpoint_of(folder, name)
    for rank in range(case.ranks):
        dist.init_process_group("fake", rank=rank, world_size=case.ranks, store=FakeStore())
        trainer = _trainer(case, rank, folder)
        trainer.load()
        _save([_Saved(_state(chunk, case, trainer)) for chunk in trainer._bare], trainer, save)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return {"files": sorted(path.parent.name for path in save.glob("*/*/*.pt"))}


def _trainer(case: Case, rank: int, folder: Path) -> Any:
    words = [*case.words.split(), "--actor-num-gpus-per-node", str(case.ranks)]
    config = trainer_config(folder / case.model, *words)
    return start_trainer(config, rank=rank, world_size=case.ranks, port=1)


def _save(chunks: list[torch.nn.Module], trainer: Any, save: Path) -> None:
    from megatron.training import checkpointing, global_vars

    args = trainer._args
    args.save, args.ckpt_format, args.use_dist_ckpt = str(save), "torch", False
    # Its state has files of its own, which say nothing of weights, and is gathered with Gloo.
    args.use_distributed_optimizer = False
    global_vars.set_args(args)
    checkpointing.save_checkpoint(ITERATION, chunks, trainer._optimizer, trainer._scheduler, 0)


def run_torch_dist_case(name: str, folder: Path) -> dict[str, Any]:
    """Save the case's checkpoint in Megatron's other format."""
    from megatron.core import dist_checkpointing, parallel_state

    from slime.backends.megatron.state.checkpoint import _DirectSave

    case, save = TORCH_DIST_CASES[name], checkpoint_of(folder, name)
    save.mkdir()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    trainer = _trainer(case, 0, folder)
    trainer.load()
    (chunk,) = trainer._bare
    if "equal layers" in name:  # of a list Megatron does not ask whether its entries are
        trainer._args.moe_layer_freq = 1
    model = _stock_model(chunk, trainer)
    model.load_state_dict(_stock_state(chunk, chunk.state_dict(), trainer))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    content = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    strategy: Any = _DirectSave()
    dist_checkpointing.save(content, str(save), strategy)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {"files": sorted(path.name for path in save.iterdir()), "keys": _keys(content)}


def _keys(content: dict[str, Any]) -> set[str]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return {value.key for value in nested_values(content)}


class _Saved(torch.nn.Module):
    """A model that is saved as this state."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._state = state

    def state_dict_for_save_checkpoint(self) -> dict[str, Any]:
        return self._state


def _state(chunk: Any, case: Case, trainer: Any) -> dict[str, Any]:
    ours: dict[str, Any] = chunk.state_dict_for_save_checkpoint()
    if case.layers == "ours":
        return ours
    return _stock_state(chunk, ours, trainer) if case.layers == "local" else _te_state(ours)


def _stock_model(chunk: Any, trainer: Any) -> Any:
    """A GPTModel of Megatron's own local spec."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training.arguments import core_transformer_config_from_args

    args = trainer._args
    config = core_transformer_config_from_args(args)
    config.sequence_parallel = False  # asks stock norms for Apex, and changes no weight
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=chunk.vp_stage
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=trainer._architecture.dims.padded_vocab_size,
        max_sequence_length=64,
        pre_process=chunk.pre_process,
        post_process=chunk.post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        vp_stage=chunk.vp_stage,
    )


def _stock_state(chunk: Any, ours: dict[str, Tensor], trainer: Any) -> dict[str, Any]:
    """Of a stock model with the same weights."""
    state = _stock_model(chunk, trainer).state_dict_for_save_checkpoint()
    taken: set[str] = set()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            expert = re.search(r"\.local_experts\.(\d+)\.linear_fc([12])\.weight$", name)
            ours_name = name
            if expert is not None:
                ours_name = f"{name[: expert.start()]}.weight{expert[2]}"
            source = ours[ours_name]
            tensor.copy_(source if expert is None else source[int(expert[1])])
            taken.add(ours_name)
    assert taken == {name for name, value in ours.items() if isinstance(value, Tensor)}
    return state


# TransformerEngine's layers have a norm before a projection as part of it.
_FUSED = (
    (r"\.input_layernorm\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
    (r"\.pre_mlp_layernorm\.weight$", ".mlp.linear_fc1.layer_norm_weight"),
    (r"\.q_layernorm\.weight$", ".linear_q_up_proj.layer_norm_weight"),
    (r"\.kv_layernorm\.weight$", ".linear_kv_up_proj.layer_norm_weight"),
)


def _te_state(ours: dict[str, Any]) -> dict[str, Any]:
    """The same weights as TransformerEngine's layers name them, and what they keep of their scales."""
    state: dict[str, Any] = {}
    for name, tensor in ours.items():
        if name.endswith("_extra_state"):
            continue
        if found := re.search(r"\.experts\.weight([12])$", name):
            prefix = f"{name[: found.start()]}.experts.linear_fc{found[1]}"
            state |= {f"{prefix}.weight{i}": expert for i, expert in enumerate(tensor)}
            state[f"{prefix}._extra_state"] = None
            continue
        state[_te_name(name, ours)] = tensor
    state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"scales")
    return state


def _te_name(name: str, ours: dict[str, Any]) -> str:
    layer = re.match(r"decoder\.layers\.\d+", name)
    if layer is None:
        return name
    is_mla = f"{layer[0]}.self_attention.linear_kv_up_proj.weight" in ours
    has_experts = f"{layer[0]}.mlp.router.weight" in ours
    applies = (not is_mla, not has_experts, is_mla, is_mla)
    for (pattern, fused), is_so in zip(_FUSED, applies, strict=True):
        if is_so and re.search(pattern, name):
            return re.sub(pattern, fused, name)
    return name


def main() -> None:
    """All named cases; a case that fails leaves its traceback and ends this process."""
    folder = Path(sys.argv[4])
    torch.set_num_threads(1)
    from slime.backends.megatron.state import named_weights

    # It asks the other pipeline stages what they have, of which a group that sends nothing knows nothing.
    named_weights._check_complete = lambda *words: None
    for name in sys.argv[5:]:
        try:
            run = run_torch_dist_case if name in TORCH_DIST_CASES else run_case
            content = run(name, folder)
        except BaseException:
            (folder / f"{name}.error").write_text(traceback.format_exc())
            raise
        torch.save(content, folder / f"{name}.pt")
