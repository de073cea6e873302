"""TRL's side of the race: GRPOTrainer on a CPU. Runs in .race/venv and imports nothing of slime.

    .race/venv/bin/python benchmarks/race/trl_side.py SPEC.json OUT_FOLDER

Writes OUT_FOLDER/steps.jsonl: one row per optimizer step, with the time it ended.
"""

import asyncio
import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Steps(TrainerCallback):
    """Writes a row when a step has ended; the reward function leaves its numbers here."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self.numbers: dict[str, float] = {}

    def write(self, **row: float | str) -> None:
        """One row, flushed."""
        self._file.write(
            json.dumps({"time": time.time(), "cpu": time.process_time(), **row}) + "\n"
        )
        self._file.flush()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(event="begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(event="step", step=state.global_step, **self.numbers)


def learning_rate(spec: dict[str, Any], step: int) -> float:
    """Megatron's linear schedule as a share of the highest rate: warm-up from 0, then down to min_lr."""
    warmup, end, low = spec["lr_warmup_steps"], spec["num_steps"], spec["min_lr"] / spec["lr"]
    if step < warmup:
        return step / warmup
    return low + (1 - low) * (1 - min(1.0, (step - warmup) / (end - warmup)))


class Answer:
    """What the task's reward reads of a slime Sample."""

    Status = SimpleNamespace(COMPLETED="completed", TRUNCATED="truncated")

    def __init__(self, response: str, label: str, is_ended: bool) -> None:
        self.response, self.label = response, label
        self.status = self.Status.COMPLETED if is_ended else self.Status.TRUNCATED


def reward_function(spec: dict[str, Any], tokenizer: Any, steps: Steps) -> Any:
    """The very function that slime's side calls, on the text with its special tokens."""
    module, name = spec["reward"].rsplit(".", 1)
    score = getattr(importlib.import_module(module), name)
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    eos = tokenizer.eos_token_id

    async def all_of(answers: list[Answer]) -> list[float]:
        return [await score(None, answer) for answer in answers]

    def rewards(completion_ids: list[list[int]], label: list[str], **_: Any) -> list[float]:
        answers = [
            Answer("".join(words[i] for i in ids), answer, bool(ids) and ids[-1] == eos)
            for ids, answer in zip(completion_ids, label, strict=True)
        ]
        values = asyncio.run(all_of(answers))
        lengths = [len(ids) for ids in completion_ids]
        steps.numbers = {
            "reward": math.fsum(values) / len(values),
            "length_mean": sum(lengths) / len(lengths),
            "length_max": max(lengths),
            "scored_at": time.time(),
        }
        return values

    return rewards


def grpo_config(spec: dict[str, Any], out: Path) -> GRPOConfig:
    """One generation of the whole batch and one optimizer step on it, in fp32, without a reference."""
    batch = spec["num_prompts"] * spec["num_samples"]
    micro = spec["trl"]["micro_batch"]
    return GRPOConfig(
        output_dir=str(out / "trl"),
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        seed=spec["seed"], data_seed=spec["seed"],
        per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
        generation_batch_size=batch, num_generations=spec["num_samples"], num_iterations=1,
        max_steps=spec["max_steps"], max_completion_length=spec["max_response_len"],
        temperature=1.0, top_p=1.0, top_k=0,
        beta=0.0, loss_type="grpo", scale_rewards="group", epsilon=0.2, epsilon_high=0.28,
        adam_beta1=0.9, adam_beta2=0.98, weight_decay=0.0, max_grad_norm=1.0,
        learning_rate=spec["lr"],
        use_transformers_continuous_batching=spec["trl"].get("continuous_batching", False),
        dataloader_num_workers=0, dataloader_pin_memory=False,
        logging_steps=10, report_to="none", save_strategy="no", eval_strategy="no",
        disable_tqdm=True, log_completions=False,
    )  # fmt: skip


def main() -> None:
    """Train; the process's environment says how many threads torch has."""
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = spec["python_path"]
    steps = Steps(out / "steps.jsonl")
    steps.write(event="imported", threads=torch.get_num_threads())
    tokenizer = AutoTokenizer.from_pretrained(spec["start_model"])
    model = AutoModelForCausalLM.from_pretrained(spec["start_model"], dtype=torch.float32)
    rows = [json.loads(line) for line in Path(spec["train_data"]).read_text().splitlines()]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec["lr"], betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: learning_rate(spec, k))
    trainer = GRPOTrainer(
        model=model,
        args=grpo_config(spec, out),
        reward_funcs=reward_function(spec, tokenizer, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
        callbacks=[steps],
    )
    trainer.train()
    steps.write(event="end")


if __name__ == "__main__":
    main()
