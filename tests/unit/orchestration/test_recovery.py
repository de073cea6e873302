"""Recovery: which engines get weights when, with a fake trainer and a fake fleet."""

from collections.abc import Sequence

import pytest

from slime.errors import EngineUnavailable, WeightSyncError
from slime.orchestration import recovery as recovery_module
from slime.orchestration.engine_watch import Server
from slime.orchestration.recovery import MAX_FAILED_RESTORES, RayEngines, Recovery, SyncResult


def servers(*names: str) -> tuple[Server, ...]:
    """`a` is an engine, `a2` the same engine at the same address in its life 2."""
    return tuple(Server(name.rstrip("0123456789"), int(name[1:] or 0)) for name in names)


class FakeEngines:
    """A fleet whose `ups` are the answers of bring_up, one after the other; the last stays."""

    def __init__(self, *ups: tuple[str, ...]) -> None:
        self.ups = [servers(*names) for names in ups]
        self.admitted: list[tuple[str, ...]] = []
        self.looks = 0

    def look(self) -> None:
        self.looks += 1

    def bring_up(self) -> tuple[Server, ...]:
        return self.ups.pop(0) if len(self.ups) > 1 else self.ups[0]

    def admit(self, servers: Sequence[Server]) -> None:
        self.admitted.append(tuple(server.url for server in servers))


class FakeWeights:
    """A trainer whose syncs raise the errors in `failures`, then work."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls: list[str] = []

    def connect_engines(self, urls: tuple[str, ...]) -> None:
        self.calls.append("connect " + " ".join(urls))

    def update_weights(self) -> SyncResult:
        self.calls.append("update")
        self._fail()
        return {"perf/update_weights_time": 1.0}, "digest"

    def restore_engine(self, url: str) -> None:
        self.calls.append(f"restore {url}")
        self._fail()

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


def test_engines_are_looked_at_while_the_trainer_works():
    engines = FakeEngines(("a", "b"))
    Recovery(engines, FakeWeights()).train_begins()
    assert engines.looks == 1


def test_a_look_that_was_begun_answers_the_next_bring_up_and_only_that(
    monkeypatch: pytest.MonkeyPatch,
):
    calls = iter(range(9))

    class FakeMethod:
        def remote(self) -> int:
            return next(calls)

    class FakeManager:
        bring_up_engines = FakeMethod()

    waited: list[int] = []

    def fake_wait_for(refs: dict[str, int], **_: object) -> list[tuple[str, ...]]:
        waited.extend(refs.values())
        return [("a",)]

    monkeypatch.setattr(recovery_module, "wait_for", fake_wait_for)
    engines = RayEngines(FakeManager(), 1.0)
    engines.look()
    engines.bring_up()
    engines.bring_up()
    assert waited == [0, 1]


def test_engines_are_connected_once_while_they_stay_the_same():
    engines, weights = FakeEngines(("a", "b")), FakeWeights()
    recovery = Recovery(engines, weights)
    assert recovery.update_weights()[1] == "digest"
    recovery.update_weights()
    assert weights.calls == ["connect a b", "update", "update"]


def test_a_new_address_is_connected_and_admitted_after_it_has_the_weights():
    engines, weights = FakeEngines(("a", "b"), ("a", "c")), FakeWeights()
    recovery = Recovery(engines, weights)
    recovery.update_weights()
    recovery.update_weights()
    assert weights.calls == ["connect a b", "update", "connect a c", "update"]
    assert engines.admitted[-1] == ("a", "c")


def test_an_engine_that_dies_in_a_sync_makes_it_start_again_without_it():
    engines = FakeEngines(("a", "b"), ("a",))
    weights = FakeWeights(WeightSyncError("broadcast failed"))
    Recovery(engines, weights).update_weights()
    assert weights.calls == ["connect a b", "update", "connect a", "update"]
    assert engines.admitted == [("a",)]


def test_a_sync_that_fails_with_all_engines_alive_is_an_error():
    engines, weights = FakeEngines(("a", "b")), FakeWeights(WeightSyncError("checksum"))
    with pytest.raises(WeightSyncError, match="checksum"):
        Recovery(engines, weights, death_shows_s=0.0).update_weights()
    assert engines.admitted == []


def test_a_death_may_show_later_than_what_it_did_to_the_sync():
    engines = FakeEngines(("a", "b"), ("a", "b"), ("a",))
    weights = FakeWeights(WeightSyncError("connection reset"))
    Recovery(engines, weights).update_weights()
    assert weights.calls == ["connect a b", "update", "connect a", "update"]


def test_engines_that_came_back_in_a_round_get_weights_one_by_one_and_serve():
    engines, weights = FakeEngines(("a",)), FakeWeights(EngineUnavailable("died again"))
    Recovery(engines, weights).restore(servers("b", "c"), num_serving=1)
    assert weights.calls == ["restore b", "restore c"]
    assert engines.admitted == [("c",)]


def test_an_engine_never_gets_newer_weights_than_the_others_in_a_round():
    engines, weights = FakeEngines(("a",)), FakeWeights()
    recovery = Recovery(engines, weights)
    recovery.update_weights()
    recovery.trained()
    recovery.restore(servers("b"), num_serving=1)
    assert "restore b" not in weights.calls
    recovery.restore(servers("b"), num_serving=0)  # nobody is left to differ from
    assert engines.admitted[-1] == ("b",)
    recovery.update_weights()
    recovery.restore(servers("c"), num_serving=1)
    assert engines.admitted[-1] == ("c",)


def test_an_engine_that_got_its_weights_meanwhile_is_left_alone():
    # The fleet was asked before the sync, its answer is read after it.
    engines, weights = FakeEngines(("a", "b")), FakeWeights()
    recovery = Recovery(engines, weights)
    recovery.update_weights()
    recovery.restore(servers("b"), num_serving=1)
    recovery.restore(servers("c"), num_serving=2)
    recovery.restore(servers("c"), num_serving=2)
    assert weights.calls == ["connect a b", "update", "restore c"]


def test_restoring_gives_up_after_many_failures_in_a_row():
    weights = FakeWeights(*[WeightSyncError("checksum")] * MAX_FAILED_RESTORES)
    recovery = Recovery(FakeEngines(("a",)), weights)
    for _ in range(MAX_FAILED_RESTORES - 1):
        recovery.restore(servers("b"), num_serving=1)
    with pytest.raises(WeightSyncError, match="checksum"):
        recovery.restore(servers("b"), num_serving=1)


def test_an_engine_that_came_back_at_its_old_address_is_new():
    engines, weights = FakeEngines(("a", "b"), ("a", "b1")), FakeWeights()
    recovery = Recovery(engines, weights)
    recovery.update_weights()
    recovery.restore(servers("b1"), num_serving=1)
    recovery.update_weights()
    assert weights.calls == ["connect a b", "update", "restore b", "connect a b", "update"]


def test_a_sync_is_done_again_when_an_engine_died_in_it_and_is_back_at_its_address():
    engines = FakeEngines(("a", "b"), ("a", "b1"))
    weights = FakeWeights(WeightSyncError("broadcast failed"))
    Recovery(engines, weights).update_weights()
    assert weights.calls == ["connect a b", "update", "connect a b", "update"]
