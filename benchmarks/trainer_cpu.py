"""Seconds per update of the trainer at the size of the quickstart, on one CPU thread.

A Qwen3 of 0.22 M parameters; a round of 256 samples of 20 to 30 tokens with 5 to 13 of response (GRPO), and one of 128
(SFT). Prints JSON: wall and CPU milliseconds, median and least of the repetitions.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.checkpoint.mapping import ModelDims, load_mapping
from slime.cli.parse import load_config
from slime.data.batch import RolloutBatch
from slime.data.sample import Sample
from slime.training.batching import make_rollout_batches
from slime.training.interface import ModelTag
from slime.training.update import run_update

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> None:
    """Random weights under the names on disk."""
    torch.manual_seed(0)
    shapes = load_mapping("qwen3").hf_parameters(ModelDims.from_hf_config(MODEL))
    tensors = {
        name: torch.randn(shape) * 0.1 if len(shape) == 2 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(MODEL))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_samples(count: int) -> list[Sample]:
    """Groups of 8 random samples."""
    rng = random.Random(0)
    samples: list[Sample] = []
    for i in range(count):
        length, response = rng.randint(20, 30), rng.randint(5, 13)
        tokens = [rng.randrange(MODEL["vocab_size"]) for _ in range(length)]
        samples.append(
            Sample(
                group_index=i // 8,
                index=i,
                tokens=tokens,
                response_length=response,
                reward=rng.random(),
                rollout_log_probs=[-1.0] * response,
                status=Sample.Status.COMPLETED,
            )
        )
    return samples


def measure(function: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Milliseconds of one call, after three to warm up."""
    for _ in range(3):
        function()
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(repetitions):
        start, start_cpu = time.perf_counter(), time.process_time()
        function()
        cpu.append(1e3 * (time.process_time() - start_cpu))
        wall.append(1e3 * (time.perf_counter() - start))
    return {
        "wall_ms_median": round(statistics.median(wall), 1),
        "wall_ms_min": round(min(wall), 1),
        "cpu_ms_median": round(statistics.median(cpu), 1),
        "cpu_ms_min": round(min(cpu), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        flags = (
            f"--hf-checkpoint {name} --device cpu --num-rollout 80 --rollout-batch-size 32 "
            "--n-samples-per-prompt 8 --global-batch-size 256 --micro-batch-size 256 --lr 4e-4 "
            "--actor-num-gpus-per-node 1 --rollout-num-gpus 1 --debug-train-only "
            "--disable-rollout-global-dataset"
        ).split()
        model_flags = megatron_flags_from_hf(MODEL)
        grpo = load_config([*flags, *model_flags])
        sft_flags = "--loss-type sft_loss --calculate-per-token-loss --n-samples-per-prompt 1"
        sizes = "--rollout-batch-size 128 --global-batch-size 128 --micro-batch-size 128"
        disable = "--disable-compute-advantages-and-returns"
        sft = load_config([*flags, *model_flags, *f"{sft_flags} {sizes} {disable}".split()])

        from slime.backends.megatron.trainer import MegatronTrainer

        trainer = MegatronTrainer(
            grpo, rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=29555
        )
        trainer.load()

    def one_batch(count: int, config: Any) -> RolloutBatch:
        samples = make_samples(count)
        rewards = [float(sample.reward or 0.0) for sample in samples]
        return make_rollout_batches(samples, rewards, rewards, config, rollout_id=0, dp_size=1)[0]

    large, small = one_batch(256, grpo), one_batch(128, sft)
    result = {
        "grpo_update_256": measure(
            lambda: run_update(trainer, large, grpo, rollout_id=0), repetitions
        ),
        "sft_update_128": measure(
            lambda: run_update(trainer, small, sft, rollout_id=0), repetitions
        ),
        "log_probs_256": measure(lambda: trainer.log_probs(large, ModelTag.ACTOR), repetitions),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
