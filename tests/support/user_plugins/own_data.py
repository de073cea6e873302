"""Prompts of one's own: a source from scratch, one on top of slime's, and a buffer filter."""

import json
import os

from slime.rollout.data_source import DataSource, RolloutDataSourceWithBuffer
from slime.utils.types import Sample


class Sums(DataSource):
    def __init__(self, args):
        self.args = args
        self.next = 0
        self.returned = []

    def get_samples(self, num_samples):
        groups = self.returned[:num_samples]
        self.returned = self.returned[num_samples:]
        while len(groups) < num_samples:
            a, b = self.next, self.next + 1
            groups.append(
                [
                    Sample(
                        group_index=self.next,
                        index=self.next * self.args.n_samples_per_prompt + i,
                        prompt=f"{a} + {b} = ?\n",
                        label=str(a + b),
                    )
                    for i in range(self.args.n_samples_per_prompt)
                ]
            )
            self.next += 1
        return groups

    def add_samples(self, samples):
        self.returned += samples

    def save(self, rollout_id):
        if self.args.save:
            os.makedirs(self.args.save, exist_ok=True)
            with open(f"{self.args.save}/sums_{rollout_id}.json", "w") as file:
                json.dump({"next": self.next}, file)

    def load(self, rollout_id=None):
        if rollout_id is not None and rollout_id >= 0 and self.args.load:
            with open(f"{self.args.load}/sums_{rollout_id}.json") as file:
                self.next = json.load(file)["next"]

    def __len__(self):
        return 1000


class Replaying(RolloutDataSourceWithBuffer):
    """Puts every group that trained back once."""

    def __init__(self, args):
        super().__init__(args)
        self.metadata.setdefault("seen", [])

    def get_samples(self, num_samples):
        groups = super().get_samples(num_samples)
        self.metadata["seen"] += [group[0].group_index for group in groups]
        return groups


def newest_first(args, rollout_id, buffer, num_samples):
    taken = buffer[-num_samples:][::-1] if num_samples else []
    del buffer[len(buffer) - len(taken) :]
    return taken


def put_back_failures(args, all_samples, data_source):
    for group in all_samples:
        if all(sample.get_reward_value(args) == 0 for sample in group):
            fresh = [
                Sample(group_index=s.group_index, index=s.index, prompt=s.prompt, label=s.label)
                for s in group
            ]
            data_source.add_samples([fresh])
