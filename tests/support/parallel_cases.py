"""Cases of the parallel suites: words for Megatron, and the rank's part in running them.

Called as `python parallel_cases.py RANK WORLD_SIZE PORT FOLDER NAME...`: runs the named cases one
after the other in one process group; rank 0 leaves FOLDER/NAME.pt. The reference is made by
`reference_run` in the test's own process.
"""

import contextlib
import faulthandler
import gc
import logging
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.cut_cases import CUTS, PER_TOKEN, run_cut
from support.megatron_runs import (
    policy_gradient_loss,
    random_batch,
    rank_batch,
    start_trainer,
    train_step,
    trainer_config,
    weights_of,
)

from slime.config.layout import data_parallel_rank, data_parallel_size
from slime.data.batch import RolloutBatch
from slime.training.interface import ModelTag

VOCAB = 106
SEEDS = (1, 2, 3)
PROBE_SEED = 9
CUT_MODEL = "qwen3"
NUM_SAMPLES = 8
_SP = "--sequence-parallel"
_DP = "--overlap-grad-reduce --overlap-param-gather"
_HOST = "--optimizer-cpu-offload --use-precision-aware-optimizer"
_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_RECOMPUTE_SOME = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"


@dataclass(frozen=True)
class Case:
    """One parallel layout of one model.

    Attributes:
        model: name of the folder with the model.
        words: of the command line.
        ranks: processes.
        num_steps: optimizer steps; four ranks on two cores take seconds for one.
    """

    model: str
    words: str
    ranks: int = 2
    num_steps: int = 3


def _tp(size: int) -> str:
    return f"--tensor-model-parallel-size {size}"


def _pp(size: int) -> str:
    return f"--pipeline-model-parallel-size {size}"


def _cp(size: int) -> str:
    return f"--context-parallel-size {size}"


def _ep(size: int) -> str:
    return f"--expert-model-parallel-size {size}"


_PROVIDER = "--custom-model-provider-path support.spec_plugin.provide"
_VPP = "--num-virtual-stages-per-pipeline-rank 2"

CASES: dict[str, Case] = {
    "dp2 overlap": Case("qwen3", _DP),
    "dp2 overlap, many buckets": Case("qwen3_untied", f"{_DP} --ddp-bucket-size 3000"),
    "qwen3_moe ep2 overlap, many buckets": Case(
        "qwen3_moe", f"{_ep(2)} {_DP} --ddp-bucket-size 3000"
    ),
    "tp2": Case("qwen3", _tp(2)),
    "qwen3_moe ep2 overlap, optimizer on the host": Case("qwen3_moe", f"{_ep(2)} {_DP} {_HOST}"),
    "tp2 sp recompute": Case("qwen3", f"{_tp(2)} {_SP} {_RECOMPUTE}"),
    "pp2 first 1": Case("qwen3_untied", f"{_pp(2)} --decoder-first-pipeline-num-layers 1"),
    "pp2 vpp2 tied overlap": Case("qwen3", f"{_pp(2)} {_VPP} {_DP}"),
    "pp2 vpp2 tied, model provider": Case("qwen3", f"{_pp(2)} {_VPP} {_PROVIDER}"),
    "cp2 overlap": Case("qwen3_untied", f"{_cp(2)} {_DP}"),
    "glm4 tp2 sp": Case("glm4", f"{_tp(2)} {_SP}"),
    "glm4 cp2": Case("glm4", _cp(2)),
    "glm4 pp2 last 1": Case("glm4", f"{_pp(2)} --decoder-last-pipeline-num-layers 1"),
    "olmo2 tp2": Case("olmo2", _tp(2)),
    "olmo2 tp2 sp": Case("olmo2", f"{_tp(2)} {_SP} {_DP}"),
    "olmo2 pp2 recompute": Case("olmo2", f"{_pp(2)} {_RECOMPUTE_SOME}"),
    "olmo2 cp2": Case("olmo2", _cp(2)),
    "llama tp2 sp": Case("llama", f"{_tp(2)} {_SP}"),
    "qwen2 tp2": Case("qwen2", _tp(2)),
    "qwen3_moe dp2": Case("qwen3_moe", _DP),
    "qwen3_moe ep2": Case("qwen3_moe", f"{_ep(2)} {_DP}"),
    "qwen3_moe tp2 sp": Case("qwen3_moe", f"{_tp(2)} {_SP}"),
    "qwen3_moe tp2 sp etp1 ep2": Case(
        "qwen3_moe", f"{_tp(2)} {_SP} {_ep(2)} --expert-tensor-parallel-size 1"
    ),
    "qwen3_moe cp2 ep2": Case("qwen3_moe", f"{_cp(2)} {_ep(2)}"),
    "qwen3_moe pp2 vpp2": Case("qwen3_moe", f"{_pp(2)} --num-layers-per-virtual-pipeline-stage 1"),
    "glm4_moe ep2": Case("glm4_moe", _ep(2)),
    "glm4_moe pp2 recompute": Case("glm4_moe", f"{_pp(2)} {_RECOMPUTE_SOME}"),
    "deepseek_v3 ep2 overlap": Case("deepseek_v3", f"{_ep(2)} {_DP}"),
    "deepseek_v3 cp2": Case("deepseek_v3", _cp(2)),
    "deepseek_v3 pp2": Case("deepseek_v3", _pp(2)),
    "tp2 sp pp2 vpp2 overlap": Case("qwen3", f"{_tp(2)} {_SP} {_pp(2)} {_VPP} {_DP}", 4),
    "tp2 sp cp2": Case("qwen3_untied", f"{_tp(2)} {_SP} {_cp(2)}", 4),
    "tp2 dp2": Case("qwen3", f"{_tp(2)} {_DP}", 4),
    "pp2 cp2 vpp2": Case("qwen3", f"{_pp(2)} {_cp(2)} {_VPP}", 4),
    "pp4": Case("qwen3", _pp(4), 4),
    "cp4": Case("qwen3_untied", _cp(4), 4),
    "qwen3_moe tp2 sp pp2 etp1 ep2": Case(
        "qwen3_moe", f"{_tp(2)} {_SP} {_pp(2)} {_ep(2)} {_DP} --expert-tensor-parallel-size 1", 4
    ),
    "qwen3_moe ep4": Case("qwen3_moe", _ep(4), 4),
    "glm4_moe tp2 sp cp2 ep2": Case("glm4_moe", f"{_tp(2)} {_SP} {_cp(2)} {_ep(2)}", 4, 1),
    "deepseek_v3 tp4 sp etp2 ep2": Case(
        "deepseek_v3", f"{_tp(4)} {_SP} {_ep(2)} --expert-tensor-parallel-size 2", 4, 1
    ),
    "deepseek_v3 tp2 sp ep2 dp2": Case("deepseek_v3", f"{_tp(2)} {_SP} {_ep(2)} {_DP}", 4),
}

# The same layouts in the precision of real runs, on cards only.
BF16_CASES: dict[str, Case] = {
    f"{name} bf16": replace(CASES[name], words=f"{CASES[name].words} --bf16", num_steps=1)
    for name in (
        "dp2 overlap, many buckets",
        "tp2",
        "tp2 sp recompute",
        "pp2 vpp2 tied overlap",
        "cp2 overlap",
        "glm4 tp2 sp",
        "glm4 cp2",
        "qwen3_moe ep2",
        "qwen3_moe tp2 sp",
        "qwen3_moe tp2 sp etp1 ep2",
        "qwen3_moe cp2 ep2",
        "qwen3_moe ep2 overlap, optimizer on the host",
        "glm4_moe ep2",
        "deepseek_v3 ep2 overlap",
        "deepseek_v3 cp2",
        "tp2 sp pp2 vpp2 overlap",
        "tp2 sp cp2",
        "qwen3_moe ep4",
        "deepseek_v3 tp2 sp ep2 dp2",
    )
}

_TE = "--bf16 --transformer-impl transformer_engine"
# With TransformerEngine's modules.
TE_CASES: dict[str, Case] = {
    f"{name} te": replace(CASES[name], words=f"{CASES[name].words} {_TE}", num_steps=1)
    for name in (
        "dp2 overlap",
        "tp2",
        "tp2 sp recompute",
        "cp2 overlap",
        "qwen3_moe ep2",
        "tp2 sp cp2",
    )
}


@dataclass(frozen=True)
class Reshard:
    """A checkpoint saved by one layout of two ranks and loaded by another.

    Attributes:
        model: name of the folder with the model.
        saved, loaded: words of the command line.
    """

    model: str
    saved: str
    loaded: str


RESHARDS: dict[str, Reshard] = {
    "tp2 to pp2": Reshard("qwen3_untied", _tp(2), _pp(2)),
    "tp2 sp to tp2": Reshard("qwen3", f"{_tp(2)} {_SP}", _tp(2)),
    "pp2 vpp2 to tp2": Reshard("qwen3", f"{_pp(2)} {_VPP}", _tp(2)),
    "dp2 to tp2": Reshard("qwen3", _DP, _tp(2)),
    "qwen3_moe ep2 to dp2": Reshard("qwen3_moe", _ep(2), _DP),
    "qwen3_moe tp2 sp etp2 to ep2": Reshard("qwen3_moe", f"{_tp(2)} {_SP}", _ep(2)),
    "deepseek_v3 tp2 sp to pp2": Reshard("deepseek_v3", f"{_tp(2)} {_SP}", _pp(2)),
}


_MOE_LAYOUTS = {
    "ep2": _ep(2),
    "tp2 sp": f"{_tp(2)} {_SP}",
    "pp2 vpp2": f"{_pp(2)} {_VPP}",
}
_DENSE_LAYOUTS = {"tp2": _tp(2), "pp2": _pp(2), "pp2 vpp2": f"{_pp(2)} {_VPP}"}
# A converted Hugging Face folder, loaded and saved again by two ranks.
CONVERSIONS: dict[str, Case] = {
    f"convert {family} {layout}": Case(family, words)
    for family, layouts in (
        *((name, _DENSE_LAYOUTS) for name in ("llama", "qwen2", "qwen3", "glm4", "olmo2")),
        *((name, _MOE_LAYOUTS) for name in ("qwen3_moe", "glm4_moe", "deepseek_v3")),
    )
    for layout, words in layouts.items()
}


class Ranks:
    """This process as one of `world_size` ranks, which start trainers one after the other."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.rank, self.world_size, self.port = rank, world_size, port
        self._trainer: Any = None

    def end_last(self) -> None:
        """Let the trainer before go: the threads of its groups would slow down all that follow."""
        if self._trainer is not None:
            self._trainer.close()
        self._trainer = None
        gc.collect()

    def start(self, model: Path, words: str) -> tuple[Any, Callable[[int], RolloutBatch]]:
        """(a trainer of this layout, what gives its part of the batch of a seed).

        The trainer before it trains no more.
        """
        self.end_last()
        given = [*words.split(), "--actor-num-gpus-per-node", str(self.world_size)]
        config = trainer_config(model, *given)
        trainer = start_trainer(config, rank=self.rank, world_size=self.world_size, port=self.port)
        self._trainer = trainer
        dp_rank, dp_size = data_parallel_rank(config, self.rank), data_parallel_size(config)
        assert trainer.layout.dp_rank == dp_rank

        def batch(seed: int) -> RolloutBatch:
            whole = random_batch(num_samples=NUM_SAMPLES, vocab_size=VOCAB, seed=seed)
            return rank_batch(whole, dp_rank, dp_size, micro_batches=2)

        return trainer, batch


def run_case(case: Case, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Some optimizer steps: metrics of each, weights and log-probs after the last."""
    trainer, batch = ranks.start(folder / case.model, case.words)
    trainer.load()
    metrics = [
        trainer.train_step(train_step(batch(seed)), policy_gradient_loss)
        for seed in SEEDS[: case.num_steps]
    ]
    return {
        "metrics": metrics,
        "weights": weights_of(trainer),
        "log_probs": trainer.log_probs(batch(PROBE_SEED), ModelTag.ACTOR),
        "dp_size": trainer.layout.dp_size,
    }


def run_reshard(name: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A step, a checkpoint and a step; the same second step by who loads the checkpoint."""
    case, checkpoint = RESHARDS[name], checkpoint_of(folder, name)
    words = f"{case.saved} --save {checkpoint} --save-interval 1"
    trainer, batch = ranks.start(folder / case.model, words)
    trainer.load()
    trainer.train_step(train_step(batch(1)), policy_gradient_loss)
    trainer.save(0)
    saved = weights_of(trainer)
    went_on = second_step(trainer, batch)
    trainer, batch = ranks.start(folder / case.model, f"{case.loaded} --load {checkpoint}")
    with log_lines("slime.backends.megatron.state.checkpoint") as lines:
        first_rollout = trainer.load()
    return {
        "saved": saved,
        "went_on": went_on,
        "first_rollout": first_rollout,
        "loaded": weights_of(trainer),
        "resumed": second_step(trainer, batch),
        "log": lines,
    }


def run_cuts(name: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """One round by the cut of this name, with both normalisations."""
    return {
        words: run_cut(
            folder / CUT_MODEL,
            f"{CUTS[name].words} {words}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            port=ranks.port,
        )
        for words in ("", PER_TOKEN)
    }


def run_conversion(name: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Load what was converted from the model's folder, and save it."""
    case = CONVERSIONS[name]
    words = f"--load {released(folder, case.model)} --save {checkpoint_of(folder, name)}"
    trainer, _ = ranks.start(folder / case.model, f"{case.words} {words} --save-interval 1")
    first_rollout = trainer.load()
    trainer.save(0)
    return {"first_rollout": first_rollout}


def released(folder: Path, model: str) -> Path:
    """Where the checkpoint of a model's Hugging Face folder is."""
    return folder / f"{model}.released"


def checkpoint_of(folder: Path, name: str) -> Path:
    """Where a reshard case saves."""
    return folder / f"{name.replace(' ', '_')}.checkpoint"


def second_step(trainer: Any, batch: Callable[[int], RolloutBatch]) -> dict[str, Any]:
    """Metrics of one more optimizer step, and the weights after it."""
    metrics = trainer.train_step(train_step(batch(2)), policy_gradient_loss)
    return {"metrics": metrics, "weights": weights_of(trainer)}


@contextlib.contextmanager
def log_lines(name: str) -> Generator[list[str]]:
    """What the logger of this name says at INFO within the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    target = logging.getLogger(name)
    before = target.level
    target.addHandler(handler)
    target.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(before)


def _sizes(name: str) -> list[str]:
    """Parallel sizes of a case: groups of the same sizes are used again, new ones cost seconds."""
    case = (CASES | BF16_CASES | TE_CASES | CONVERSIONS | RESHARDS | CUTS)[name]
    words = case.saved if isinstance(case, Reshard) else case.words
    return sorted(re.findall(r"--\S+(?:-parallel-size|virtual\S+) \d+", words))


def main() -> None:
    """All named cases; a case that fails leaves its traceback and ends this process."""
    rank, world_size, port, folder = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
    )
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ranks = Ranks(rank, world_size, port)
    for name in sorted(sys.argv[5:], key=_sizes):
        sys.stderr.write(f"{time.monotonic():.1f} s: {name}\n")
        try:
            if name in RESHARDS:
                content = run_reshard(name, ranks, Path(folder))
            elif name in CONVERSIONS:
                content = run_conversion(name, ranks, Path(folder))
            elif name in CUTS:
                content = run_cuts(name, ranks, Path(folder))
            else:
                content = run_case((CASES | BF16_CASES | TE_CASES)[name], ranks, Path(folder))
        except BaseException:
            (Path(folder) / f"{name}.{rank}.error").write_text(traceback.format_exc())
            raise
        if rank == 0:
            torch.save(content, Path(folder) / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()
