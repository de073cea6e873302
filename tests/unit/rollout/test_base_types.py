from typing import Any

import pytest
from support.rollout_world import make_args

from slime.data.sample import Sample
from slime.errors import DataError
from slime.rollout.base_types import (
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    call_rollout_fn,
    flatten,
)
from slime.rollout.state import GenerateState


def call(function: Any, args: Any = None, *, evaluation: bool = False) -> Any:
    return call_rollout_fn(function, args, 3, None, evaluation=evaluation)


def test_typed_output_is_passed_on():
    output = RolloutFnTrainOutput(samples=[], metrics={"a": 1})
    assert call(lambda *a, evaluation: output) is output


def test_legacy_list_and_dict_are_wrapped():
    train = call(lambda *a, evaluation: [[Sample()]])
    assert train == RolloutFnTrainOutput(samples=[[Sample()]])
    data: dict[str, Any] = {"aime": {"rewards": [1.0]}}
    assert call(lambda *a, evaluation: data, evaluation=True) == RolloutFnEvalOutput(data)


def test_coroutine_is_run():
    async def generate(*_: Any, evaluation: bool) -> RolloutFnTrainOutput:
        return RolloutFnTrainOutput(samples=[])

    assert call(generate).metrics is None


def test_abort_of_the_round_before_is_over():
    args = make_args("http://127.0.0.1:1")
    state = GenerateState(args)
    state.aborted = True
    seen = call(lambda a, *b, evaluation: [[Sample(index=int(GenerateState(a).aborted))]], args)
    assert seen.samples == [[Sample(index=0)]]
    assert state.rollout_id == 3


@pytest.mark.parametrize("evaluation", [False, True])
def test_other_results_are_refused(evaluation: bool):
    with pytest.raises(DataError, match=f"returned NoneType for evaluation={evaluation}"):
        call(lambda *a, evaluation: None, evaluation=evaluation)


def test_flatten_opens_fan_outs_in_order():
    a, b, c = Sample(index=0), Sample(index=1), Sample(index=2)
    assert [s.index for s in flatten([a, [b, c]])] == [0, 1, 2]
