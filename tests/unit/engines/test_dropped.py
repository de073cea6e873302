from typing import Any

import pytest
from support.fake_engine import Reply, fake_engine

from slime.engines.client import EngineClient
from slime.errors import EngineProtocolError

DROPPED = b'{"object":"error","message":"Request 6a51 was aborted","type":"BadRequest","code":400}'


async def ask(payload: dict[str, Any], reply: Reply) -> Any:
    async with fake_engine(lambda payload, number: reply) as engine:
        return await EngineClient(engine.url, timeout_s=5).generate(payload)


@pytest.mark.parametrize(
    ("payload", "count"),
    [
        ({"input_ids": [1, 2], "sampling_params": {}}, None),
        ({"text": "a", "sampling_params": {"n": 1}}, None),
        ({"input_ids": [1, 2], "sampling_params": {"n": 3}}, 3),
        ({"input_ids": [[1, 2], [3]], "sampling_params": {}}, 2),
        ({"text": ["a", "b"], "sampling_params": {"n": 2}}, 4),
    ],
)
async def test_a_request_that_an_abort_met_before_it_ran_has_an_empty_answer(
    payload: dict[str, Any], count: int | None
):
    answer = await ask(payload, Reply(status=400, body=DROPPED))
    answers = [answer] if count is None else answer
    assert len(answers) == (count or 1)
    for one in answers:
        assert one["meta_info"]["finish_reason"]["type"] == "abort"
        assert one["output_ids"] == one["meta_info"]["output_token_logprobs"] == []


async def test_other_refusals_are_errors():
    with pytest.raises(EngineProtocolError, match="was aborted by a committee"):
        await ask(
            {"input_ids": [1], "sampling_params": {}},
            Reply(status=400, body=b'{"message":"my request for tea was aborted by a committee"}'),
        )
