"""SGLang's own bench client on requests given to it: one process, a JSON line per run.

benchmarks/rollout.py starts it. Reads `{"base_url", "requests", "concurrency", "output", "words"}` a
line, runs `sglang.benchmark.serving` as its command line does, with the prompts (token ids) and
lengths in the file `requests`, and answers with a line once the row is in `output`. The process
stays, so that importing SGLang is paid once.
"""

import importlib.util
import json
import os
import sys
from types import ModuleType
from typing import Any


def stand_in_for_datasets() -> None:
    """SGLang's list of data sets imports Hugging Face's library, of which nothing is used here."""
    if importlib.util.find_spec("datasets") is None:
        module = ModuleType("datasets")
        module.load_dataset = None  # type: ignore[attr-defined]
        sys.modules["datasets"] = module


def register_given_requests() -> None:
    """`--dataset-name custom` is then what rollout.py wrote down."""
    from sglang.benchmark.datasets import DATASET_MAPPING, DatasetRow
    from sglang.benchmark.datasets.common import BaseDataset

    class GivenRequests(BaseDataset):
        """Rows `{"ids", "length"}` of the file."""

        def __init__(self, path: str) -> None:
            self.path = path

        @classmethod
        def from_args(cls, args: Any) -> "GivenRequests":
            return cls(args.dataset_path)

        def load(self, tokenizer: Any, model_id: str | None = None) -> list[Any]:
            with open(self.path) as file:
                rows = [json.loads(line) for line in file]
            return [
                DatasetRow(prompt=row["ids"], prompt_len=len(row["ids"]), output_len=row["length"])
                for row in rows
            ]

    DATASET_MAPPING["custom"] = GivenRequests


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the client prints goes to the log
    stand_in_for_datasets()
    register_given_requests()
    from sglang.benchmark.serving import cli_main

    answers.write("ready\n")
    for line in sys.stdin:
        job = json.loads(line)
        sys.argv = [
            "sglang.benchmark.serving", "--backend", "sglang", "--base-url", job["base_url"],
            "--dataset-name", "custom", "--dataset-path", job["requests"],
            "--max-concurrency", str(job["concurrency"]), "--output-file", job["output"],
            "--temperature", "1.0", "--flush-cache", "--disable-tqdm", *job["words"],
        ]  # fmt: skip
        cli_main()  # what it raises ends this process, and stands in the log
        answers.write("done\n")


if __name__ == "__main__":
    main()
