"""The two sizes of the race: task, model, batch, learning rate; and the command line of each side."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.checkpoint.hf import read_hf_config

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
QUICKSTART = ROOT / "examples" / "quickstart"
VENV = ROOT / ".race" / "venv"
# What both sides import: the task's reward, and for the quickstart's task its folder.
PYTHON_PATH = (str(HERE), str(QUICKSTART))


@dataclass(frozen=True, kw_only=True)
class Size:
    """One race.

    Attributes:
        reward: dotted path of `async def reward(args, sample)`, the same function on both sides.
        make_data: command lines that write {start}/data and {start}/model.
        sft: flags of the supervised stage that makes the start model.
        num_prompts, num_samples: prompts of a step, and answers to each.
        note: what the reader of its table should know.
        warm_steps: first steps that do not count as steady state.
        tune_steps: steps of each short run that chooses threads.
    """

    name: str
    about: str
    reward: str
    make_data: tuple[tuple[str, ...], ...]
    sft: str
    num_prompts: int
    num_samples: int
    num_steps: int
    max_response_len: int
    lr: float
    min_lr: float
    lr_warmup_steps: int
    warm_steps: int
    tune_steps: int
    trl_micro_batches: tuple[int, ...]
    note: str = ""

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.num_prompts * self.num_samples


QUICKSTART_SIZE = Size(
    name="quickstart",
    about="the quickstart: middle letter, 0.22 M parameters, answers of at most 12 tokens",
    reward="middle_letter.reward",
    make_data=(
        (str(QUICKSTART / "middle_letter.py"), "{start}/data", "--seed", "0"),
        (str(QUICKSTART / "make_model.py"), "{start}/model", "--seed", "0"),
    ),
    sft="--rollout-batch-size 1920 --global-batch-size 128 --lr 3e-3 --min-lr 3e-4",
    num_prompts=32,
    num_samples=8,
    num_steps=80,
    max_response_len=12,
    lr=4e-4,
    min_lr=4e-5,
    lr_warmup_steps=10,
    warm_steps=5,
    tune_steps=20,
    trl_micro_batches=(256,),
)
HEAVY_SIZE = Size(
    name="heavy",
    about="countdown: 4.5 M parameters, heavy-tailed answers (median 24 tokens, up to 252)",
    reward="countdown.reward",
    make_data=((str(HERE / "countdown.py"), "{start}", "--seed", "0"),),
    sft="--rollout-batch-size 640 --global-batch-size 64 --lr 2e-3 --min-lr 2e-4",
    num_prompts=16,
    num_samples=8,
    num_steps=14,
    max_response_len=256,
    lr=3e-4,
    min_lr=1e-4,
    lr_warmup_steps=1,
    warm_steps=2,
    tune_steps=2,
    trl_micro_batches=(128, 32),
    note="The learning rate and the number of steps were chosen by looking at short runs. Sixteen prompts a step, "
    "some of them far harder than others, make the reward of one step noisy (0.1): when it first reaches 0.9 "
    "says little here.",
)
SIZES = {size.name: size for size in (QUICKSTART_SIZE, HEAVY_SIZE)}


def words(text: str) -> list[str]:
    """A piece of a command line."""
    return text.split()


def environment(threads: int, **more: str) -> dict[str, str]:
    """The same for both sides: offline, no GPU, `threads` torch threads per process."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(PYTHON_PATH),
    }
    return env | fixed | more


def make_start(size: Size, folder: Path) -> Path:
    """The folder with data/ and sft/hf, made once: random model, then slime's SFT stage."""
    start = folder / size.name / "start"
    if (start / "sft" / "hf" / "config.json").exists():
        return start
    for line in size.make_data:
        command = [sys.executable, *(word.format(start=start) for word in line)]
        subprocess.run(command, check=True, env=environment(1), cwd=ROOT)
    flags = [
        *_common_flags(start / "model", ranks=2, seed=0),
        *words(f"--run-dir {start}/sft --save {start}/sft/checkpoints --save-hf {start}/sft/hf"),
        *words("--rollout-function-path slime.rollout.sft_rollout.generate_rollout"),
        *words("--loss-type sft_loss --calculate-per-token-loss --debug-train-only"),
        *words(f"--disable-compute-advantages-and-returns --prompt-data {start}/data/demos.jsonl"),
        *words("--input-key messages --rollout-shuffle --num-epoch 1 --n-samples-per-prompt 1"),
        *words("--lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01"),
        *size.sft.split(),
    ]
    command = [sys.executable, str(ROOT / "train_async.py"), *flags]
    subprocess.run(command, check=True, env=environment(1), cwd=ROOT, stdout=sys.stderr)
    return start


def slime_command(
    size: Size, start: Path, out: Path, *, ranks: int, steps: int, seed: int
) -> list[str]:
    """train.py, as the quickstart calls it, without evaluation and checkpoints."""
    model = start / "sft" / "hf"
    flags = [
        *_common_flags(model, ranks=ranks, seed=seed),
        *words(f"--run-dir {out} --rollout-num-gpus 2 --rollout-num-gpus-per-engine 1"),
        *words(f"--prompt-data {start}/data/train.jsonl --input-key prompt --label-key label"),
        *words(f"--apply-chat-template --rollout-shuffle --custom-rm-path {size.reward}"),
        *words(f"--num-rollout {steps} --rollout-batch-size {size.num_prompts}"),
        *words(f"--n-samples-per-prompt {size.num_samples} --global-batch-size {size.batch}"),
        *words(f"--rollout-max-response-len {size.max_response_len} --rollout-temperature 1"),
        *words("--advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0"),
        *words(f"--lr {size.lr} --min-lr {size.min_lr} --lr-decay-style linear"),
        *words(f"--lr-warmup-iters {size.lr_warmup_steps} --weight-decay 0"),
        *words(f"--lr-decay-iters {size.num_steps}"),
    ]
    return [sys.executable, str(ROOT / "train.py"), *flags]


def trl_command(
    size: Size, start: Path, out: Path, *, micro_batch: int, steps: int, seed: int
) -> list[str]:
    """trl_side.py with its specification beside what it writes."""
    out.mkdir(parents=True, exist_ok=True)
    spec: dict[str, Any] = {
        "start_model": str(start / "sft" / "hf"),
        "train_data": str(start / "data" / "train.jsonl"),
        "reward": size.reward,
        "python_path": PYTHON_PATH,
        "seed": seed,
        "max_steps": steps,
        "trl": {"micro_batch": micro_batch},
    }
    names = words("num_prompts num_samples num_steps max_response_len lr min_lr lr_warmup_steps")
    spec |= {name: vars(size)[name] for name in names}
    path = out / "spec.json"
    path.write_text(json.dumps(spec, indent=2))
    return [str(VENV / "bin" / "python"), str(HERE / "trl_side.py"), str(path), str(out)]


def _common_flags(model: Path, *, ranks: int, seed: int) -> list[str]:
    return [
        *megatron_flags_from_hf(read_hf_config(model)),
        *words(f"--hf-checkpoint {model} --device cpu --actor-num-nodes 1"),
        *words(f"--actor-num-gpus-per-node {ranks} --seed {seed} --rollout-seed {seed}"),
        *words("--optimizer adam --adam-beta1 0.9 --adam-beta2 0.98"),
        *words("--attention-dropout 0 --hidden-dropout 0"),
        *words("--use-dynamic-batch-size --max-tokens-per-gpu 8192"),
    ]
