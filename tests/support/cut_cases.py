"""Cases of test_packing.py: one round of samples, cut in many ways by the real batching code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.megatron_runs import start_trainer, trainer_config, weights_of
from support.rollouts import random_samples

from slime.config.config import Config
from slime.config.layout import data_parallel_rank, data_parallel_size, micro_batch_multiple
from slime.data.batch import RolloutBatch
from slime.data.sample import Sample
from slime.training.batching import make_rollout_batches
from slime.training.rewards import post_process_rewards
from slime.training.update import run_update

VOCAB = 106
EXECUTIONS_PER_STEP = 4
NUM_STEPS = 2
_LOSS = (
    "--use-kl-loss --kl-loss-coef 0.1 --kl-loss-type low_var_kl --entropy-coef 0.01 --use-tis "
    f"--normalize-advantages --global-batch-size {EXECUTIONS_PER_STEP}"
)
_BALANCED = "--balance-data --balance-by-flops"
_VPP = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"


@dataclass(frozen=True)
class Cut:
    """Words of the command line that must change no result, and how many ranks they need."""

    words: str
    ranks: int = 2


def _cap(tokens: int) -> str:
    return f"--use-dynamic-batch-size --max-tokens-per-gpu {tokens}"


CUTS: dict[str, Cut] = {
    "pairs": Cut("--micro-batch-size 2", 1),
    "packed": Cut(_cap(80), 1),
    "tightly packed": Cut(_cap(20), 1),
    "packed balanced": Cut(f"{_cap(60)} {_BALANCED}", 1),
    "cut dp2": Cut("--micro-batch-size 2"),
    "cut dp2 packed": Cut(_cap(50)),
    "cut dp2 packed balanced": Cut(f"{_cap(50)} {_BALANCED}"),
    "cut cp2 packed": Cut(f"{_cap(30)} --context-parallel-size 2"),
    "cut pp2": Cut("--pipeline-model-parallel-size 2"),
    "cut pp2 vpp2 packed balanced": Cut(f"{_cap(50)} {_BALANCED} {_VPP}"),
    "cut tp2 sp packed": Cut(f"{_cap(50)} --tensor-model-parallel-size 2 --sequence-parallel"),
}
PER_TOKEN = "--calculate-per-token-loss"


def samples_of_round() -> list[Sample]:
    """8 executions of up to 3 samples each; some tokens masked, some samples removed."""
    return random_samples(
        num_groups=4,
        group_size=2,
        seed=9,
        vocab_size=VOCAB,
        max_response=20,
        max_fan_out=3,
        mask_probability=0.25,
        removed_probability=0.1,
    )


def batches_of(config: Config) -> list[RolloutBatch]:
    """The round as the rollout actor cuts it, for every data-parallel rank."""
    samples = samples_of_round()
    raw, rewards = post_process_rewards(samples, config)
    return make_rollout_batches(
        samples,
        rewards,
        raw,
        config,
        rollout_id=0,
        dp_size=data_parallel_size(config),
        cp_size=config.context_parallel_size,
        micro_batch_multiple=micro_batch_multiple(config),
    )


def run_cut(
    model: Path, words: str, *, rank: int = 0, world_size: int = 1, port: int = 0
) -> dict[str, Any]:
    """Metrics of each step, and the weights after the last."""
    ranks = ["--actor-num-gpus-per-node", str(world_size)]
    given = [*_LOSS.split(), "--ref-load", str(model), *ranks, *words.split()]
    config = trainer_config(model, *given)
    trainer = start_trainer(config, rank=rank, world_size=world_size, port=port)
    trainer.load()
    batch = batches_of(config)[data_parallel_rank(config, rank)]
    result = run_update(trainer, batch, config, rollout_id=0)
    return {"metrics": result.step_metrics, "weights": weights_of(trainer)}
