"""A recorded round comes back as it was, and only when nothing that made it has changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.data.sample import Sample
from slime.orchestration.rounds import (
    Round,
    RoundStore,
    frozen,
    rollout_entry,
    rollout_fingerprint,
    sample_digest,
)
from slime.rollout.base_types import GroupFates

STATE = {"version": 1, "sample_offset": 4}


def make_sample(index: int, **more: Any) -> Sample:
    return Sample(
        index=index,
        group_index=index // 2,
        prompt="p",
        tokens=[1, 2, 3 + index],
        response_length=2,
        reward=0.1 + index,
        rollout_log_probs=[-0.1, -1 / 3],
        weight_versions=["3"],
        status=Sample.Status.COMPLETED,
        **more,
    )


@pytest.fixture
def made() -> Round:
    routed = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    groups = [
        [make_sample(0, rollout_routed_experts=routed), make_sample(1, metadata={"a": (1, 2)})],
        [make_sample(2), [make_sample(3, rollout_id=3), make_sample(3, rollout_id=3)]],
    ]
    return Round(groups, {"x": float("inf")}, GroupFates({"zero_std": [2]}, [3]), (0, 4))


def save(store: RoundStore, made: Round) -> None:
    copy = replace(made, groups=frozen(made.groups))
    store.save(7, copy, weights="w", data_state=STATE)


def test_a_round_comes_back_bit_for_bit(tmp_path: Path, made: Round) -> None:
    store = RoundStore(tmp_path, "f")
    save(store, made)
    found = store.load(7, weights={"w"})
    assert found is not None
    again, state = found
    assert state == STATE
    assert (again.metrics, again.fates, again.taken) == (made.metrics, made.fates, made.taken)
    assert rollout_entry(again, [0, 1, 2, 3, 3]) == rollout_entry(made, [0, 1, 2, 3, 3])
    assert again.groups[0][1].metadata == {"a": (1, 2)}
    assert np.array_equal(
        again.groups[0][0].rollout_routed_experts, made.groups[0][0].rollout_routed_experts
    )
    assert [type(item) for item in again.groups[1]] == [Sample, list]


def test_other_weights_other_flags_damage_and_absence_mean_generating_again(
    tmp_path: Path, made: Round
) -> None:
    save(RoundStore(tmp_path, "f"), made)
    assert RoundStore(tmp_path, "f").load(7, weights={"other"}) is None
    assert RoundStore(tmp_path, "other").load(7, weights={"w"}) is None
    assert RoundStore(tmp_path, "f").load(8, weights={"w"}) is None
    path = tmp_path / "7.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert RoundStore(tmp_path, "f").load(7, weights={"w"}) is None


def test_old_rounds_are_pruned(tmp_path: Path, made: Round) -> None:
    store = RoundStore(tmp_path, "f")
    save(store, made)
    store.prune(6)
    assert store.load(7, weights={"w"}) is not None
    store.prune(7)
    assert store.load(7, weights={"w"}) is None


def test_a_sample_that_json_cannot_hold_leaves_the_round_unrecorded(
    tmp_path: Path, made: Round, caplog: pytest.LogCaptureFixture
) -> None:
    made.groups[0][0].metadata["file"] = object()
    save(RoundStore(tmp_path, "f"), made)
    assert not list(tmp_path.iterdir())
    assert "round 7 is not recorded" in caplog.text


def test_samples_that_no_step_takes_stand_in_the_entry(made: Round) -> None:
    assert rollout_entry(made, [0, 1, 3])["unused"] == [2, 3]
    assert rollout_entry(made, None)["is_converted"]


def test_the_digest_sees_every_bit() -> None:
    base = sample_digest(make_sample(0))
    changed = make_sample(0)
    changed.rollout_log_probs = [-0.1, float(np.nextafter(-1 / 3, 0))]
    shorter = replace(make_sample(0), response_length=1)
    assert len({base, sample_digest(changed), sample_digest(shorter)}) == 3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(base_argv(tmp_path))


def test_the_fingerprint_follows_what_makes_samples(config: Config, tmp_path: Path) -> None:
    base = rollout_fingerprint(config)
    assert rollout_fingerprint(replace(config, num_rollout=99, lr=1.0)) == base
    assert rollout_fingerprint(replace(config, rollout_temperature=0.5)) != base
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"input": "2", "label": "2"}\n')
    assert rollout_fingerprint(config) != base


def test_an_edited_reward_function_changes_the_fingerprint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "edited_reward.py"
    module.write_text("async def reward(args, sample, **kwargs):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    custom = replace(config, custom_rm_path="edited_reward.reward")
    base = rollout_fingerprint(custom)
    module.write_text("async def reward(args, sample, **kwargs):\n    return 1.0\n")
    assert rollout_fingerprint(custom) != base
