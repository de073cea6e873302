import threading
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.observability.phases import (
    MAX_SEGMENTS,
    Phase,
    PhaseClock,
    last_of,
    mean_of,
    side_metrics,
    sum_of,
)


class FakeTime:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def clock(time: FakeTime) -> PhaseClock:
    return PhaseClock(time)


def test_an_inner_block_counts_for_itself_alone(time: FakeTime, clock: PhaseClock):
    time.sleep(1)
    with clock.phase(Phase.SYNC):
        time.sleep(2)
        with clock.phase(Phase.OFFLOAD):
            time.sleep(4)
        time.sleep(8)
    assert clock.take() == {Phase.IDLE: 1, Phase.SYNC: 10, Phase.OFFLOAD: 4}


def test_a_block_that_raises_has_ended(time: FakeTime, clock: PhaseClock):
    with pytest.raises(ZeroDivisionError), clock.phase(Phase.SAVE):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), clock.side_by_side(Phase.EVAL):
        1 / 0  # noqa: B018
    clock.take()
    time.sleep(3)
    assert clock.take() == {Phase.IDLE: 3}


def test_a_reward_counts_only_while_no_answer_is_being_written(time: FakeTime, clock: PhaseClock):
    with ExitStack() as answer, clock.phase(Phase.DATA):
        answer.enter_context(clock.side_by_side(Phase.GENERATE))
        with clock.side_by_side(Phase.REWARD):
            time.sleep(1)
            answer.close()
            time.sleep(2)
        time.sleep(4)
    assert clock.take() == {Phase.GENERATE: 1, Phase.REWARD: 2, Phase.DATA: 4}


def test_the_second_of_two_answers_still_runs_when_the_first_has_ended(time, clock):
    first, second = ExitStack(), ExitStack()
    for answer in (first, second):
        answer.enter_context(clock.side_by_side(Phase.GENERATE))
    first.close()
    time.sleep(2)
    second.close()
    time.sleep(1)
    assert clock.take() == {Phase.IDLE: 1, Phase.GENERATE: 2}


def test_an_evaluation_goes_before_a_generation_beside_it(time: FakeTime, clock: PhaseClock):
    with clock.side_by_side(Phase.GENERATE):
        time.sleep(1)
        with clock.side_by_side(Phase.EVAL):
            time.sleep(2)
    assert clock.take() == {Phase.GENERATE: 1, Phase.EVAL: 2}


def test_a_block_may_end_before_the_one_inside_as_threads_do(time: FakeTime, clock: PhaseClock):
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(clock.phase(Phase.DATA))
    inner.enter_context(clock.phase(Phase.OFFLOAD))
    outer.close()
    time.sleep(1)
    inner.close()
    assert clock.take() == {Phase.OFFLOAD: 1}


def test_what_goes_on_is_cut_where_it_is_taken(time: FakeTime, clock: PhaseClock):
    with clock.phase(Phase.TRAIN):
        time.sleep(1)
        assert clock.take() == {Phase.TRAIN: 1}
        time.sleep(2)
    assert clock.take() == {Phase.TRAIN: 2}


def test_a_record_tells_the_order(time: FakeTime, clock: PhaseClock):
    time.sleep(9)
    with clock.record() as segments:
        for name, seconds in [(Phase.DATA, 1), (Phase.TRAIN, 2), (Phase.DATA, 4)]:
            with clock.phase(name):
                time.sleep(seconds)
        time.sleep(8)
    time.sleep(9)
    assert segments == [
        (Phase.DATA, 1),
        (Phase.TRAIN, 2),
        (Phase.DATA, 4),
        (Phase.IDLE, 8),
    ]


def test_a_long_record_keeps_its_seconds_and_the_order_of_the_end(time, clock):
    with clock.record() as segments:
        for _ in range(2 * MAX_SEGMENTS):
            for name in (Phase.GENERATE, Phase.REWARD):
                with clock.phase(name):
                    time.sleep(1)
        with clock.phase(Phase.DATA):
            time.sleep(5)
    assert len(segments) <= MAX_SEGMENTS + 1
    total = sum_of(segments)
    assert total[Phase.GENERATE] == total[Phase.REWARD] == 2 * MAX_SEGMENTS
    assert last_of(segments, 6) == [(Phase.DATA, 5), (Phase.REWARD, 1)]


def test_a_wait_is_explained_by_the_end_of_what_the_other_side_did(time, clock):
    # The driver trained for 7 seconds while a generation of 10 went on, and then waited for it.
    with clock.phase(Phase.TRAIN):
        time.sleep(7)
    time.sleep(3.5)
    clock.explain_idle(3.5, [(Phase.GENERATE, 8.0), (Phase.REWARD, 1.0), (Phase.DATA, 1.0)])
    assert clock.take() == {
        Phase.IDLE: 0,
        Phase.TRAIN: 7,
        Phase.GENERATE: 1.5,
        Phase.REWARD: 1,
        Phase.DATA: 1,
    }


def test_what_the_other_side_does_not_explain_stays_idle(time: FakeTime, clock: PhaseClock):
    time.sleep(5)
    clock.explain_idle(5, [(Phase.GENERATE, 3.0)])
    assert clock.take() == {Phase.IDLE: 2, Phase.GENERATE: 3}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("phase"), st.sampled_from(list(Phase))),
        st.tuples(
            st.just("beside"),
            st.sampled_from([Phase.EVAL, Phase.GENERATE, Phase.REWARD, Phase.DATA]),
        ),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("sleep"), st.integers(1, 9)),
        st.tuples(st.just("explain"), st.integers(1, 9)),
    ),
    max_size=60,
)


@given(STEPS)
def test_phases_add_up_to_the_time_whatever_happens(steps):
    time = FakeTime()
    clock = PhaseClock(time)
    running: list[ExitStack] = []
    for kind, value in steps:
        if kind == "sleep":
            time.sleep(value)
        elif kind == "explain":
            clock.explain_idle(value, [(Phase.TRAIN, 4.0), (Phase.DATA, 2.0)])
        elif kind == "end":
            if running:
                running.pop(value % len(running)).close()
        else:
            claim = clock.phase(value) if kind == "phase" else clock.side_by_side(value)
            running.append(ExitStack())
            running[-1].enter_context(claim)
    assert sum(clock.take().values()) == pytest.approx(time.seconds - 100.0)


def test_many_threads_lose_no_time():
    clock = PhaseClock()

    def work() -> None:
        for _ in range(2000):
            with clock.side_by_side(Phase.GENERATE), clock.phase(Phase.DATA):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.take()
    with clock.record() as segments:
        sum(range(1000))
    assert [name for name, _ in segments] == [Phase.IDLE]  # every claim has ended


def test_metrics_of_a_side_have_its_idle_share():
    assert side_metrics("trainer", {Phase.TRAIN: 3.0, Phase.IDLE: 1.0, Phase.SAVE: 0.0}) == {
        "perf/trainer/train_time": 3.0,
        "perf/trainer/idle_time": 1.0,
        "perf/trainer/idle_ratio": 0.25,
    }


def test_the_mean_of_ranks_counts_a_phase_that_only_some_had():
    ranks = [{Phase.TRAIN: 3.0, Phase.IDLE: 1.0}, {Phase.IDLE: 4.0}]
    assert mean_of(ranks) == {Phase.TRAIN: 1.5, Phase.IDLE: 2.5}
