"""The engine thread delivers whole groups, runs calls between steps, and fails loudly."""

import threading
from collections.abc import Iterator

import pytest
from support.engine_runs import make_request, make_scheduler, random_prompts
from support.tiny_models import tiny_model

from slime.engines.embedded.engine import EngineLoop
from slime.engines.embedded.model import ModelRunner
from slime.engines.embedded.requests import Request, RequestGroup
from slime.engines.protocol import PauseMode
from slime.errors import EngineUnavailable

DEADLINE_S = 60.0


class Inbox:
    """Collects what the engine delivers."""

    def __init__(self) -> None:
        self.groups: list[RequestGroup] = []
        self.lengths: list[int] = []
        self.arrived = threading.Condition()

    def deliver(self, groups: list[RequestGroup], progress: list[Request]) -> None:
        with self.arrived:
            self.groups += groups
            self.lengths += [len(request.output_ids) for request in progress]
            self.arrived.notify_all()

    def wait(self, count: int) -> list[RequestGroup]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.groups) >= count, DEADLINE_S)
            return self.groups


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(tiny_model("qwen3"))


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def loop(runner: ModelRunner, inbox: Inbox) -> Iterator[EngineLoop]:
    made = EngineLoop(make_scheduler(runner), inbox.deliver)
    made.start()
    yield made
    made.stop()
    assert not made.is_alive


def group_of(count: int, tokens: int = 5, **values: object) -> RequestGroup:
    prompts = random_prompts(count)
    return RequestGroup(
        tuple(
            make_request(p, seed=i, max_new_tokens=tokens + i, **values)
            for i, p in enumerate(prompts)
        )
    )


def test_a_group_is_delivered_once_when_its_last_request_ends(
    loop: EngineLoop, inbox: Inbox
) -> None:
    groups = [group_of(3), group_of(1), group_of(5)]
    for group in groups:
        loop.submit(group.requests)
    assert set(inbox.wait(3)) == set(groups)
    assert all(r.finish is not None for group in groups for r in group.requests)


def test_streaming_requests_report_every_token(loop: EngineLoop, inbox: Inbox) -> None:
    loop.submit(group_of(1, tokens=6, stream=True).requests)
    inbox.wait(1)
    assert inbox.lengths == [1, 2, 3, 4, 5, 6]


def test_calls_run_between_steps_and_hand_back_errors(loop: EngineLoop, inbox: Inbox) -> None:
    loop.submit(group_of(2, tokens=200).requests)
    assert loop.call(lambda s: s.table.active).result(DEADLINE_S) in (0, 2)
    loop.call(lambda s: s.pause(PauseMode.ABORT)).result(DEADLINE_S)
    assert {r.finish["type"] for r in inbox.wait(1)[0].requests if r.finish} == {"abort"}
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda _: 1 / 0).result(DEADLINE_S)


def test_stopping_ends_every_request(runner: ModelRunner, inbox: Inbox) -> None:
    loop = EngineLoop(make_scheduler(runner), inbox.deliver)
    loop.start()
    loop.submit(group_of(2, tokens=200).requests)
    loop.call(lambda _: None).result(DEADLINE_S)
    loop.stop()
    assert {r.finish["type"] for r in inbox.wait(1)[0].requests if r.finish} == {"abort"}
    with pytest.raises(EngineUnavailable):
        loop.call(lambda _: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_step_ends_every_request_and_is_remembered(inbox: Inbox) -> None:
    runner = ModelRunner(tiny_model("qwen3"))
    failed = threading.Event()
    loop = EngineLoop(make_scheduler(runner), inbox.deliver, failed.set)
    loop.start()
    runner.model.model.norm = None
    loop.submit(group_of(2).requests)
    assert failed.wait(DEADLINE_S)
    reasons = [request.finish for request in inbox.wait(1)[0].requests]
    assert [reason and reason["status_code"] for reason in reasons] == [503, 503]
    loop.stop()
    assert isinstance(loop.failure, TypeError)
    with pytest.raises(EngineUnavailable, match="stopped"):
        loop.submit(group_of(1).requests)
