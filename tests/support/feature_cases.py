"""Features of the trainer on two ranks: what each rank does, one start for all.

Called as `python feature_cases.py RANK WORLD_SIZE PORT FOLDER NAME...`; rank 0 leaves
FOLDER/NAME.pt. The references are made in the test's own process.
"""

import faulthandler
import gc
import signal
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.critics import CLIP, critic_step, head_weight, set_head
from support.megatron_runs import (
    loss_columns,
    policy_gradient_loss,
    random_batch,
    rank_batch,
    start_trainer,
    train_step,
    trainer_config,
)
from support.routing import move_trainers_routers, with_experts
from support.user_losses import masked_nll

from slime.config.layout import data_parallel_rank, data_parallel_size
from slime.data.batch import RolloutBatch
from slime.training.custom_loss import custom_loss
from slime.training.interface import ModelTag, TrainStep
from slime.training.value_loss import value_loss

VOCAB = 106
NUM_SAMPLES = 8
SEEDS = (1, 2)
PROBE_SEED = 9

# name -> words of a critic on two ranks
CRITICS = {
    "critic tp2": "--tensor-model-parallel-size 2",
    "critic tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "critic pp2": "--pipeline-model-parallel-size 2",
    "critic cp2": "--context-parallel-size 2",
    "critic dp2": "--overlap-grad-reduce --overlap-param-gather",
}

_CUSTOM = "--loss-type custom_loss --custom-loss-function-path support.user_losses.masked_nll"
# name -> words of a run with a loss of the user's own
CUSTOM_LOSSES = {
    "custom cp2": f"{_CUSTOM} --context-parallel-size 2",
    "custom pp2": f"{_CUSTOM} --pipeline-model-parallel-size 2",
    "custom dp2": f"{_CUSTOM} --overlap-grad-reduce",
}

_R2, _R3 = "--use-routing-replay", "--use-rollout-routing-replay"
_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_VPP = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
# name -> (model, words of a run that replays the choice of experts)
REPLAYS = {
    "r2 ep2": ("qwen3_moe", f"{_R2} --expert-model-parallel-size 2"),
    "r3 ep2": ("deepseek_v3", f"{_R3} --expert-model-parallel-size 2"),
    "r2 tp2 sp": ("deepseek_v3", f"{_R2} {_SP}"),
    "r3 tp2 sp": ("qwen3_moe", f"{_R3} {_SP}"),
    "r3 cp2": ("qwen3_moe", f"{_R3} --context-parallel-size 2"),
    "r2 cp2 recompute": ("deepseek_v3", f"{_R2} --context-parallel-size 2 {_FULL}"),
    "r2 pp2 vpp2 recompute": ("qwen3_moe", f"{_R2} {_VPP} {_FULL}"),
    "r3 pp2 recompute": ("deepseek_v3", f"{_R3} --pipeline-model-parallel-size 2 {_FULL}"),
    "r3 pp2 vpp2": ("qwen3_moe", f"{_R3} {_VPP}"),
}
REPLAY_SEED = 3


class Ranks:
    """This process as one of `world_size` ranks, which start trainers one after the other."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self._rank, self._world_size, self._port = rank, world_size, port
        self._trainer: Any = None

    def start(self, model: Path, words: str, role: str = "actor") -> tuple[Any, Any]:
        """(a loaded trainer of this layout, what gives its part of a whole batch).

        The trainer before it trains no more: the threads of its groups would slow down this one.
        """
        if self._trainer is not None:
            self._trainer.close()
        self._trainer = None
        gc.collect()
        given = [*words.split(), "--actor-num-gpus-per-node", str(self._world_size)]
        config = trainer_config(model, *given)
        trainer = start_trainer(
            config, rank=self._rank, world_size=self._world_size, port=self._port, role=role
        )
        self._trainer = trainer
        trainer.load()
        place = data_parallel_rank(config, self._rank), data_parallel_size(config)
        return trainer, partial(own_part, place)


def own_part(place: tuple[int, int], whole: RolloutBatch) -> RolloutBatch:
    """The samples of data-parallel rank place[0] of place[1], in two micro-batches."""
    part = rank_batch(whole, *place, micro_batches=2)
    if whole.rollout_routed_experts is None:
        return part
    return replace(
        part, rollout_routed_experts=whole.rollout_routed_experts[slice(place[0], None, place[1])]
    )


def whole_batch(seed: int) -> RolloutBatch:
    """All samples of a seed."""
    return random_batch(num_samples=NUM_SAMPLES, vocab_size=VOCAB, seed=seed)


def run_critic(words: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Values, two steps, and values again."""
    trainer, part = ranks.start(folder / "qwen3", words, role="critic")
    set_head(trainer, head_weight())
    probe = part(whole_batch(PROBE_SEED))
    values = [trainer.values(probe)]
    loss = partial(value_loss, clip=CLIP)
    metrics = [trainer.train_step(critic_step(part(whole_batch(s))), loss) for s in SEEDS]
    values.append(trainer.values(probe))
    return {"values": values, "metrics": metrics, "dp_size": trainer.layout.dp_size}


def custom_step(part: RolloutBatch) -> TrainStep:
    """A step for a loss of the user's own."""
    columns = {**loss_columns(part), "loss_mask": part.loss_masks.rows()}
    return TrainStep(batch=part, plan=part.steps[0], columns=columns, needs_logits=True)


OWN_LOSS = partial(custom_loss, function=masked_nll, args=None, per_token=False)


def run_custom(words: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Two steps with logits."""
    trainer, part = ranks.start(folder / "qwen3", words)
    steps = [custom_step(part(whole_batch(seed))) for seed in SEEDS]
    return {"metrics": [trainer.train_step(step, OWN_LOSS) for step in steps]}


def run_replay(case: tuple[str, str], ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A step after the routers moved, with the experts of before; and the log-probs it saw."""
    model, words = case
    trainer, part = ranks.start(folder / model, words)
    whole = whole_batch(REPLAY_SEED)
    if _R3 in words:
        whole = with_experts(whole, torch.load(folder / f"{model}.experts", weights_only=False))
    batch = part(whole)
    if _R2 in words:
        trainer.log_probs(batch, ModelTag.ACTOR)
    move_trainers_routers(trainer)
    step = train_step(batch)
    return {
        "log_probs": trainer.log_probs(batch, ModelTag.ACTOR) if _R3 in words else None,
        "metrics": trainer.train_step(step, policy_gradient_loss),
        "dp_size": trainer.layout.dp_size,
    }


def run_case(name: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The case of this name."""
    if name in CRITICS:
        return run_critic(CRITICS[name], ranks, folder)
    if name in CUSTOM_LOSSES:
        return run_custom(CUSTOM_LOSSES[name], ranks, folder)
    return run_replay(REPLAYS[name], ranks, folder)


def main() -> None:
    """All named cases; one that fails leaves its traceback and ends this process."""
    rank, world_size, port = (int(word) for word in sys.argv[1:4])
    folder = Path(sys.argv[4])
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ranks = Ranks(rank, world_size, port)
    for name in sys.argv[5:]:
        sys.stderr.write(f"{time.monotonic():.1f} s: {name}\n")
        try:
            content = run_case(name, ranks, folder)
        except BaseException:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
            raise
        if rank == 0:
            torch.save(content, folder / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()
