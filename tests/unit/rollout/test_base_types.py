from typing import Any

import pytest

from slime.data.sample import Sample
from slime.errors import DataError
from slime.rollout.base_types import (
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    call_rollout_fn,
    flatten,
)


def test_typed_output_is_passed_on():
    output = RolloutFnTrainOutput(samples=[], metrics={"a": 1})
    assert call_rollout_fn(lambda *a, evaluation: output, 1, 2, 3, evaluation=False) is output


def test_legacy_list_and_dict_are_wrapped():
    train = call_rollout_fn(lambda evaluation: [[Sample()]], evaluation=False)
    assert train == RolloutFnTrainOutput(samples=[[Sample()]])
    data: dict[str, Any] = {"aime": {"rewards": [1.0]}}
    assert call_rollout_fn(lambda evaluation: data, evaluation=True) == RolloutFnEvalOutput(data)


def test_coroutine_is_run():
    async def generate(evaluation: bool) -> RolloutFnTrainOutput:
        return RolloutFnTrainOutput(samples=[])

    assert call_rollout_fn(generate, evaluation=False).metrics is None


@pytest.mark.parametrize("evaluation", [False, True])
def test_other_results_are_refused(evaluation: bool):
    with pytest.raises(DataError, match=f"returned NoneType for evaluation={evaluation}"):
        call_rollout_fn(lambda evaluation: None, evaluation=evaluation)


def test_flatten_opens_fan_outs_in_order():
    a, b, c = Sample(index=0), Sample(index=1), Sample(index=2)
    assert [s.index for s in flatten([a, [b, c]])] == [0, 1, 2]
