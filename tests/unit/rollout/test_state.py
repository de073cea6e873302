from types import SimpleNamespace

import pytest

from slime.rollout.state import Progress


def test_seconds_in_flight_count_every_sample_for_itself(monkeypatch: pytest.MonkeyPatch):
    now = 50.0
    monkeypatch.setattr("slime.rollout.state.time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress()
    now += 3
    progress.run(4)
    now += 2
    progress.run(-3)
    now += 5
    assert progress.take_sample_seconds() == 4 * 2 + 1 * 5
    now += 1
    progress.run(-1)
    now += 7
    assert progress.take_sample_seconds() == 1
    assert progress.running == 0
