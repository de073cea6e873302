"""A MegatronTrainer on a tiny model, and batches for it."""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import device
from torch import Tensor

from slime.checkpoint.architectures.qwen3 import QWEN3
from slime.checkpoint.convert import megatron_flags_from_hf
from slime.checkpoint.hf import read_hf_config
from slime.checkpoint.mapping import ModelDims
from slime.cli.parse import load_config
from slime.config.config import Config
from slime.data.batch import Ragged, RolloutBatch, StepPlan
from slime.training.interface import LossTerms, TokenView, TrainStep

_TINY_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "torch_dtype": "float32",
}


def trainer_config(model: str | Path, *words: str) -> Config:
    """The configuration of a test's run on a Hugging Face folder, through the real command line.

    Adam's epsilon is large: an ordinary one turns gradients of rounding noise into whole steps.
    """
    flags = megatron_flags_from_hf(read_hf_config(model))
    common = (
        f"--hf-checkpoint {model} --num-rollout 3 --rollout-batch-size 4 "
        "--n-samples-per-prompt 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant "
        "--weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 "
        "--actor-num-gpus-per-node 1 --rollout-num-gpus 1 --make-vocab-size-divisible-by 8 --debug-train-only "
        "--disable-rollout-global-dataset"
    )
    return load_config([*common.split(), *device.FLAGS, *flags, *words])


def random_batch(
    *, num_samples: int, vocab_size: int, seed: int, shortest: int = 4, longest: int = 24
) -> RolloutBatch:
    """Samples of different lengths, some response tokens masked, in one step of one micro-batch."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    lengths = [number(shortest, longest + 1) for _ in range(num_samples)]
    responses = [number(1, length) for length in lengths]
    tokens = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
    masks = [(torch.rand(n, generator=generator) > 0.2).float() for n in responses]
    everything = tuple(range(num_samples))
    return RolloutBatch(
        rollout_id=0,
        tokens=Ragged.from_rows(tokens, torch.int64),
        response_lengths=tuple(responses),
        loss_masks=Ragged.from_rows(masks, torch.float32),
        rewards=tuple(float(torch.randn((), generator=generator)) for _ in everything),
        raw_rewards=(0.0,) * num_samples,
        rollout_ids=everything,
        rollout_mask_sums=tuple(float(mask.sum()) for mask in masks),
        sample_indices=everything,
        truncated=(False,) * num_samples,
        steps=(step_plan([everything], masks),),
    )


def grouped(batch: RolloutBatch, group_size: int) -> RolloutBatch:
    """The batch with the prompt of each group's first sample in all of its group."""
    rows, responses = batch.tokens.rows(), batch.response_lengths
    tokens: list[Tensor] = []
    for i, row in enumerate(rows):
        first = i - i % group_size
        prompt = rows[first][: len(rows[first]) - responses[first]]
        tokens.append(torch.cat([prompt, row[len(row) - responses[i] :]]))
    return replace(batch, tokens=Ragged.from_rows(tokens, torch.int64))


def rank_batch(
    batch: RolloutBatch, rank: int, dp_size: int, micro_batches: int = 2
) -> RolloutBatch:
    """Every dp_size-th sample, with the denominators of the whole step."""
    mine = range(rank, len(batch), dp_size)
    own = tuple(range(len(mine)))
    plan = step_plan([own[i::micro_batches] for i in range(micro_batches)], batch.loss_masks.rows())

    def pick(column: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(column[i] for i in mine)

    return replace(
        batch,
        tokens=batch.tokens.select(mine),
        response_lengths=pick(batch.response_lengths),
        loss_masks=batch.loss_masks.select(mine),
        rewards=pick(batch.rewards),
        raw_rewards=pick(batch.raw_rewards),
        rollout_ids=pick(batch.rollout_ids),
        rollout_mask_sums=pick(batch.rollout_mask_sums),
        sample_indices=pick(batch.sample_indices),
        truncated=pick(batch.truncated),
        steps=(plan,),
    )


def step_plan(micro_batches: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> StepPlan:
    """A plan whose denominators are those of all samples of the step, whoever trains them."""
    return StepPlan(
        micro_batches=tuple(tuple(samples) for samples in micro_batches),
        num_rollouts=len(masks),
        num_tokens=float(sum(mask.sum() for mask in masks)),
        num_samples=len(masks),
    )


def loss_columns(batch: RolloutBatch) -> dict[str, list[Tensor]]:
    """weight = mask over the step's tokens, advantages = the sample's reward."""
    plan = batch.steps[0]
    masks = batch.loss_masks.rows()
    return {
        "weight": [mask / plan.num_tokens for mask in masks],
        "advantages": [
            torch.full_like(mask, reward) for mask, reward in zip(masks, batch.rewards, strict=True)
        ],
    }


def policy_gradient_loss(view: TokenView) -> LossTerms:
    """Weight x advantage x -log-prob, less some entropy, plus a term of whole responses.

    That term is the square of each response's sum, written as a sum over tokens: ranks that share a
    sequence add up their tokens' parts.
    """
    weight = view.columns["weight"]
    loss = -(weight * view.columns["advantages"] * view.log_probs).sum()
    assert view.entropy is not None
    loss = loss - 0.01 * (weight * view.entropy).sum()
    weighted = weight * view.log_probs
    sums = view.segment_sum(weighted)
    return LossTerms(
        loss=loss + 0.1 * (weighted * sums[view.segments]).sum(),
        metrics={"entropy_loss": (weight * view.entropy).sum()},
    )


def train_step(batch: RolloutBatch, **changes: Any) -> TrainStep:
    """The batch's only step, as `run_update` would hand it to a trainer."""
    columns = loss_columns(batch)
    return TrainStep(
        batch=batch, plan=batch.steps[0], columns=columns, needs_entropy=True, **changes
    )


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_trainer(
    config: Config, *, rank: int = 0, world_size: int = 1, port: int = 0, role: str = "actor"
) -> Any:
    """A MegatronTrainer that shares this process's group with earlier ones."""
    from slime.backends.megatron.trainer import MegatronTrainer

    return MegatronTrainer(
        config,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        master_addr="127.0.0.1",
        master_port=port or free_port(),
        role=role,  # pyright: ignore[reportArgumentType]
    )


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Copies of all weights on the CPU, by their Hugging Face names; collective."""
    return device.on_cpu(dict(trainer.named_weights()))


@dataclass(frozen=True)
class Reference:
    """transformers and torch's AdamW, one sample at a time, in one process.

    Attributes:
        losses, grad_norms: of each step, before clipping.
        weights: after the last step, under their names on disk.
        log_probs: [R] per sample of the probe, after the last step.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    log_probs: list[Tensor]


def reference_run(
    model_path: str | Path,
    batches: Sequence[RolloutBatch],
    *,
    lr: float = 1e-3,
    clip: float = 1.0,
    probe: RolloutBatch | None = None,
) -> Reference:
    """One optimizer step per batch, with the optimizer settings of `trainer_config`."""
    model = hf_model(model_path)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    losses: list[float] = []
    norms: list[float] = []
    for batch in batches:
        optimizer.zero_grad()
        loss = policy_gradient_loss(whole_view(model, batch)).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    with torch.no_grad():
        log_probs = [] if probe is None else hf_log_probs(model, probe)
    return Reference(losses, norms, dict(_published(weights)), log_probs)


def _published(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The names on disk: transformers holds the experts of a layer as one tensor."""
    for name, weight in weights.items():
        prefix, found, kind = name.partition(".mlp.experts.")
        if not found:
            yield name, weight
            continue
        for number, expert in enumerate(weight):
            parts = expert.chunk(2) if kind == "gate_up_proj" else [expert]
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            for part_name, part in zip(names, parts, strict=True):
                yield f"{prefix}.mlp.experts.{number}.{part_name}.weight", part


def hf_model(path: str | Path) -> Any:
    """A folder as transformers loads it, fp32, eager attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )


def hf_response_log_softmax(model: Any, batch: RolloutBatch) -> list[Tensor]:
    """[R, V] per sample: log-probs of the whole vocabulary where the response is predicted."""
    rows: list[Tensor] = []
    for tokens, length in zip(batch.tokens.rows(), batch.response_lengths, strict=True):
        logits = model(tokens[None]).logits[0]
        rows.append(logits[-length - 1 : -1].log_softmax(-1))
    return rows


def hf_log_probs(model: Any, batch: RolloutBatch) -> list[Tensor]:
    """[R] per sample, as `Trainer.log_probs` gives them."""
    tables = hf_response_log_softmax(model, batch)
    return [
        table.gather(1, tokens[-len(table) :, None]).squeeze(1)
        for table, tokens in zip(tables, batch.tokens.rows(), strict=True)
    ]


def whole_view(model: Any, batch: RolloutBatch) -> TokenView:
    """What a loss would see of the whole batch, by transformers and with gradient."""
    tables = hf_response_log_softmax(model, batch)
    targets = [
        row[-len(table) :, None] for row, table in zip(batch.tokens.rows(), tables, strict=True)
    ]
    segments = torch.repeat_interleave(
        torch.arange(len(batch)), torch.tensor(batch.response_lengths)
    )
    table = torch.cat(tables)
    return TokenView(
        log_probs=table.gather(1, torch.cat(targets)).squeeze(1),
        entropy=-(table.exp() * table).sum(1),
        columns={name: torch.cat(rows) for name, rows in loss_columns(batch).items()},
        segments=segments,
        num_segments=len(batch),
        segment_sum=lambda x: x.new_zeros(len(batch)).index_add(0, segments, x),
    )


def make_tiny_qwen3(
    folder: Path | str, *, vocab_size: int, seed: int = 0, tied: bool = True, **changes: int
) -> str:
    """Write a random Qwen3 (about 0.13 M parameters) without transformers; returns the folder.

    Norms differ from 1 and matrices are large, so that a test notices what lands in the wrong
    place.

    Args:
        changes: keys of `config.json` that differ.
    """
    config = _TINY_QWEN3 | {"vocab_size": vocab_size, "tie_word_embeddings": tied} | changes
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in QWEN3.hf_parameters(ModelDims.from_hf_config(config)).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = noise * shape[1] ** -0.5 if len(shape) == 2 else 1.0 + 0.1 * noise
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return str(path)
