"""Seeds for the requests of a user's function: the same whenever it runs again, never one twice.

A function of users sends the sampling parameters it was given with every turn, and several agents may
ask the same prompt at once. One seed in those parameters would give them all the same random numbers,
so the parameters come without, and the client adds a seed to each request as it leaves.
"""

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, cast

import orjson

_SEED = "sampling_seed"


class RequestSeeds:
    """The seeds of one execution of one sample, made of what is asked, not of when.

    Args:
        seed: of the sample, as `slime.rollout.seeds.sampling_seed` makes it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._asked: Counter[bytes] = Counter()

    def take(self, prompt: Any) -> int:
        """A seed in [0, 2**31) for one more request with this prompt.

        Equal prompts get a number each, in the order they come; it does not matter which of them is
        first. Different prompts do not count each other, so their order does not matter at all.

        Args:
            prompt: text or ids.
        """
        digest = blake2b(orjson.dumps(prompt, option=orjson.OPT_SERIALIZE_NUMPY)).digest()
        number = self._asked[digest]
        self._asked[digest] += 1
        key = b"%d/%d/" % (self._seed, number) + digest
        return int.from_bytes(blake2b(key, digest_size=4).digest()) & 0x7FFF_FFFF

    def derived(self, seed: int) -> int:
        """A seed in [0, 2**31) for a request that brings one: the same for the same, in this execution.

        The samples of a group may all bring the same one, and must not share random numbers.
        """
        return (
            int.from_bytes(blake2b(b"%d/%d" % (self._seed, seed), digest_size=4).digest())
            & 0x7FFF_FFFF
        )

    def applied(self, payload: Any) -> Any:
        """A /generate request with a seed for each prompt, unless it brings its own.

        The payload itself is left as it is: a function may send it again for another answer.
        """
        if not isinstance(payload, Mapping):
            return payload
        request = cast(Mapping[str, Any], payload)
        given: object = request.get("sampling_params") or {}
        if not isinstance(given, Mapping) or _SEED in given or request.get("sampling_seeds"):
            return request
        params = cast(Mapping[str, Any], given)
        prompt: object = request["input_ids"] if "input_ids" in request else request.get("text")
        prompts = cast(list[object], prompt) if isinstance(prompt, list) else []
        if prompts and isinstance(prompts[0], list | str):  # several in one request
            own: object = [{**params, _SEED: self.take(one)} for one in prompts]
        else:
            own = {**params, _SEED: self.take(prompt)}
        return {**request, "sampling_params": own}
