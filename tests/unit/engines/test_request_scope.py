import asyncio
from typing import Any

from slime.engines.request_scope import current_scope, request_scope
from slime.engines.request_seeds import RequestSeeds


def seed_of(payload: Any) -> int | None:
    scope = current_scope()
    assert scope is not None
    assert scope.seeds is not None
    return scope.seeds.applied(payload)["sampling_params"]["sampling_seed"]


def test_every_request_of_a_sample_has_its_own_seed():
    seeds = RequestSeeds(7)
    taken = [seeds.take(prompt) for prompt in ([1, 2], [1, 2], [1, 2, 3], "text", "text")]
    assert len(set(taken)) == 5
    assert all(0 <= seed < 2**31 for seed in taken)
    assert RequestSeeds(8).take([1, 2]) != taken[0]


def test_order_of_different_prompts_does_not_matter():
    one, other = RequestSeeds(7), RequestSeeds(7)
    forward = {prompt: one.take(prompt) for prompt in ("a", "b", "c")}
    backward = {prompt: other.take(prompt) for prompt in ("c", "b", "a")}
    assert forward == backward


def test_payload_is_left_alone():
    payload = {"input_ids": [1], "sampling_params": {"temperature": 1.0}}
    sent = RequestSeeds(7).applied(payload)
    assert sent["sampling_params"] == {
        "temperature": 1.0,
        "sampling_seed": RequestSeeds(7).take([1]),
    }
    assert payload["sampling_params"] == {"temperature": 1.0}


def test_a_seed_of_the_users_own_stays():
    seeds = RequestSeeds(7)
    for payload in (
        {"text": "a", "sampling_params": {"sampling_seed": 3}},
        {"text": "a", "sampling_params": {"n": 2}, "sampling_seeds": [1, 2]},
        {"text": ["a"], "sampling_params": [{}]},
        ["no object"],
    ):
        assert seeds.applied(payload) is payload


def test_prompts_of_one_request_have_a_seed_each():
    payload = {"text": ["same", "same", "other"], "sampling_params": {"top_k": 1}}
    sent = RequestSeeds(7).applied(payload)
    assert len({params["sampling_seed"] for params in sent["sampling_params"]}) == 3
    assert {params["top_k"] for params in sent["sampling_params"]} == {1}


def test_scope_ends_with_its_block_and_may_have_no_seeds():
    assert current_scope() is None
    with request_scope(7) as outer:
        with request_scope(None) as inner:
            assert current_scope() is inner
            assert inner.seeds is None
        assert current_scope() is outer
    assert current_scope() is None


async def test_tasks_of_a_block_share_its_scope():
    async def ask() -> int | None:
        await asyncio.sleep(0)
        return seed_of({"text": "same", "sampling_params": {}})

    with request_scope(7):
        first = await asyncio.gather(ask(), ask(), ask())
    with request_scope(7):
        again = await asyncio.gather(ask(), ask(), ask())
    assert len(set(first)) == 3
    assert set(first) == set(again)
