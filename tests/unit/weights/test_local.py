"""Every trainer rank feeds the engine rank on its slot; ranks are threads here, engine ranks processes."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.fake_sglang import Engines, FakeSGLang, assert_holds, serving
from torch import Tensor

from slime.engines.control import EngineControl
from slime.errors import EngineUnavailable, WeightSyncError
from slime.orchestration import ways
from slime.orchestration.ways import WayToEngines
from slime.weights.local import LocalControl, LocalTransport, Ranks
from slime.weights.sync import sync_weights

Work = Callable[[Ranks], Any]


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 9, generator=generator) for name in ("a.weight", "b.weight")}


@pytest.fixture(scope="module")
def fakes() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.end()


def on_ranks(size: int, work: Work) -> list[Any]:
    """What `work` returns on each rank, or its error; all meet at each gather."""
    barrier, slots = threading.Barrier(size, timeout=30.0), [None] * size

    def gather(rank: int, value: Any) -> list[Any]:
        slots[rank] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()
        return values

    def run(rank: int) -> Any:
        try:
            return work(Ranks(rank, lambda value: gather(rank, value)))
        except WeightSyncError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def way_to(
    urls: list[str], ranks: Ranks, *, same: bool = False, flushes: bool = True
) -> WayToEngines:
    control = EngineControl(urls, timeout_s=20.0)
    local = LocalControl(control, ranks.rank)
    transport = LocalTransport(
        control,
        local,
        ranks,
        first_seed=0,
        host="127.0.0.1",
        timeout_s=20.0,
        way="gloo",
        has_same_weights=same,
        flushes=flushes,
    )
    return WayToEngines(local, transport, has_others=True)


def sync(way: WayToEngines, content: dict[str, Tensor], version: str) -> None:
    way.begin()
    try:
        sync_weights(
            content.items(),
            control=way.control,
            transport=way.transport,
            version=version,
            bucket_bytes=200,
            verify=True,
            agree=way.agree,
        )
    except Exception as error:
        way.failed(error)
        raise


def run_syncs(
    engines: list[FakeSGLang],
    size: int,
    versions: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    *,
    same: bool = False,
    flushes: bool = True,
) -> list[Any]:
    """Each version in turn, whose number is the seed of its weights, from `size` trainer ranks."""
    rank_of: dict[int, Ranks] = {}
    monkeypatch.setattr(ways, "_gather", lambda x: rank_of[threading.get_ident()].gather(x))
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(engine)).url for engine in engines]

        def work(ranks: Ranks) -> None:
            rank_of[threading.get_ident()] = ranks
            way = way_to(urls, ranks, same=same, flushes=flushes)
            way.transport.open()
            try:
                for version in versions:
                    sync(way, weights(int(version)), version)
            finally:
                way.close()

        return on_ranks(size, work)


@pytest.mark.parametrize("flushes", [True, False])
def test_engines_forget_what_they_cached_unless_they_keep_running_requests(
    fakes: Engines, monkeypatch: pytest.MonkeyPatch, flushes: bool
) -> None:
    engines = fakes.make([(weights(0),)])
    assert run_syncs(engines, 1, ("1", "2"), monkeypatch, flushes=flushes) == [None]
    assert engines[0].flushes == [flushes, flushes, False]


def test_engines_of_one_and_of_two_slots_get_every_sync(
    fakes: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (weights(0),)
    for layout in ([[old], [old], [old]], [[old, old]]):
        engines = fakes.make(*layout)
        size = sum(map(len, layout))
        assert run_syncs(engines, size, ("1", "2"), monkeypatch) == [None] * size
        assert_holds(engines, weights(2))
        assert {engine.version for engine in engines} == {"2"}
        assert [engine.paths.count("/continue_generation") for engine in engines] == [2] * len(
            engines
        )


def test_a_rank_without_an_engine_takes_part(
    fakes: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = fakes.make([(weights(1),)])
    assert run_syncs(engines, 2, ("1", "2"), monkeypatch, same=True) == [None, None]
    assert_holds(engines, weights(2))


def test_engines_go_on_only_when_all_of_them_have_the_weights(
    fakes: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = fakes.make([(weights(0),)], [(weights(0), "b.weight")])
    first, second = run_syncs(engines, 2, ("1",), monkeypatch)
    assert "KeyError: 'b.weight'" in str(second)
    assert str(first) == str(second)  # rank 0 heard of it
    for engine in engines:
        assert engine.version == "default"
        assert "/continue_generation" not in engine.paths


def test_a_slot_without_a_trainer_is_named(fakes: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = fakes.make([(weights(0),)], [(weights(0),)])
    (error,) = run_syncs(engines, 1, ("1",), monkeypatch)
    assert "slots [1] have none" in str(error)


def test_a_dead_engine_is_named_on_every_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"

    def work(ranks: Ranks) -> str:
        way = way_to([dead], ranks)
        with pytest.raises(EngineUnavailable, match=dead) as caught:
            way.transport.open()
        way.close()
        return str(caught.value)

    assert len(on_ranks(2, work)) == 2


def test_what_fails_after_all_agreed_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are through and would not come to hear of it."""
    met: list[str | None] = []

    def gather(problem: str | None) -> list[str | None]:
        met.append(problem)
        return [problem, None]

    monkeypatch.setattr(ways, "_gather", gather)
    nothing: Any = None
    way = WayToEngines(nothing, nothing, has_others=True)
    way.begin()
    way.agree()
    way.failed(WeightSyncError("an engine did not take the version"))
    assert met == [None]
    way.begin()
    way.failed(WeightSyncError("a tensor did not fit"))
    assert met == [None, "a tensor did not fit"]
