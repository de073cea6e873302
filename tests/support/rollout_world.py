"""Arguments and prompts for rollout tests: real defaults of every flag, a fake data source."""

import argparse
from typing import Any

from slime.config.config import Config
from slime.data.sample import Sample

# Ids of the tiny tokenizer's characters; prompts are [5 + group, 6].
PROMPT_LENGTH = 2


def make_args(*urls: str, **overrides: Any) -> argparse.Namespace:
    """The namespace of a run with engines at `urls`; the first one also plays the router."""
    host, port = urls[0].removeprefix("http://").split(":")
    defaults: dict[str, Any] = {
        "rollout_batch_size": 2,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 16,
        "rollout_timeout_s": 20.0,
        "request_timeout_s": 10.0,
        "rollout_num_gpus": 1,
        "rm_type": "random",
        "custom_rm_path": "support.rollout_plugins.constant_reward",
    }
    facts = {
        "sglang_router_ip": host,
        "sglang_router_port": int(port),
        "engine_urls": list(urls),
        "num_engines": len(urls),
    }
    return Config().to_namespace(**(defaults | facts | overrides))


class FakeDataSource:
    """Numbered prompts without end, and a list of what came back, which is handed out first."""

    def __init__(self, args: Any, num_groups: int | None = None) -> None:
        self.size: int = args.n_samples_per_prompt
        self.num_groups = num_groups
        self.next_group = 0
        self.buffer: list[list[Sample]] = []
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.num_groups or 1000

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        self.asked.append(num_samples)
        groups = self.buffer[:num_samples]
        del self.buffer[:num_samples]
        while len(groups) < num_samples and self.next_group != self.num_groups:
            groups.append(self._group(self.next_group))
            self.next_group += 1
        return groups

    def add_samples(self, samples: list[list[Sample]]) -> None:
        assert all(len(group) == self.size for group in samples)
        self.buffer.extend(samples)

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def _group(self, number: int) -> list[Sample]:
        return [
            Sample(
                group_index=number,
                index=number * self.size + i,
                prompt=f"prompt {number}",
                tokens=[5 + number, 6],
                label=str(number),
            )
            for i in range(self.size)
        ]
