import asyncio
from typing import Any

from slime.engines.request_seeds import RequestSeeds, request_seeds, with_seed


def seed_of(payload: Any) -> int | None:
    return with_seed(payload)["sampling_params"].get("sampling_seed")


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


def test_seed_is_added_inside_the_block_only_and_leaves_the_payload_alone():
    payload = {"input_ids": [1], "sampling_params": {"temperature": 1.0}}
    assert seed_of(payload) is None
    with request_seeds(7):
        assert seed_of(payload) == RequestSeeds(7).take([1])
        assert payload["sampling_params"] == {"temperature": 1.0}
        with request_seeds(None):
            assert seed_of(payload) is None
    assert seed_of(payload) is None


def test_a_seed_of_the_users_own_stays():
    with request_seeds(7):
        assert seed_of({"text": "a", "sampling_params": {"sampling_seed": 3}}) == 3
        several = {"text": "a", "sampling_params": {"n": 2}, "sampling_seeds": [1, 2]}
        assert with_seed(several) is several
        assert with_seed(["no object"]) == ["no object"]


async def test_tasks_of_a_block_share_its_count():
    async def ask() -> int | None:
        await asyncio.sleep(0)
        return seed_of({"text": "same", "sampling_params": {}})

    with request_seeds(7):
        first = await asyncio.gather(ask(), ask(), ask())
    with request_seeds(7):
        again = await asyncio.gather(ask(), ask(), ask())
    assert len(set(first)) == 3
    assert set(first) == set(again)


def test_prompts_of_one_request_have_a_seed_each():
    with request_seeds(7):
        sent = with_seed({"text": ["same", "same", "other"], "sampling_params": {"top_k": 1}})
    assert len({params["sampling_seed"] for params in sent["sampling_params"]}) == 3
    assert {params["top_k"] for params in sent["sampling_params"]} == {1}
