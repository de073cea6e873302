"""An answer that an engine cut short goes on: the tokens there are become the prompt of the rest.

SGLang's running requests end when weights change (`PauseMode.ABORT`). Their tokens and log-probs
stay, written by the old weights; the rest is written by the new ones. Nothing here asks why a
request was cut.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from slime.data.chat import Tokenizer
from slime.data.sample import Sample
from slime.engines.gate import gate
from slime.rollout.seeds import continued_seed

Status = Sample.Status

# An engine that cuts its requests is about to pause: what came before would be cut again, and its
# pause waits for that (in SGLang a second).
FIRST_WAIT_S = 0.1
MAX_WAIT_S = 2.0
# Cuts in a row without a new token; then something else than weight syncs is at work.
MAX_EMPTY_CUTS = 20
_PENALTIES = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}


class Cuts:
    """Counts the cuts of one answer.

    Args:
        length: response tokens before its first request.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._num_empty = 0

    async def wait(self, length: int) -> bool:
        """Wait for the engines to come to rest; False when an answer does not get on.

        Args:
            length: response tokens by now.
        """
        self._num_empty = 0 if length > self._length else self._num_empty + 1
        self._length = length
        if self._num_empty > MAX_EMPTY_CUTS:
            return False
        await settle(self._num_empty)
        return True


async def settle(num_empty: int = 0) -> None:
    """Wait for the engines to come to rest, the longer the more cuts in a row brought nothing.

    Where requests were held back for the cut (`engines/gate.py`), only until they are let go.
    """
    if await gate.opened_within(FIRST_WAIT_S) and num_empty == 0:
        return
    await asyncio.sleep(min(FIRST_WAIT_S * 2**num_empty, MAX_WAIT_S))


def can_go_on(params: Mapping[str, Any]) -> bool:
    """Whether the rest can be asked for as if nothing had happened.

    Penalties count what a request itself has written; the rest's request would begin at zero.
    """
    return all(params.get(name, neutral) == neutral for name, neutral in _PENALTIES.items())


def rest_params(params: Mapping[str, Any], written: int) -> dict[str, Any]:
    """Sampling parameters for the rest of an answer of which `written` tokens are there.

    Its random numbers are fresh: those of the seed are spent. `max_new_tokens` is the caller's
    business, who counts tool outputs too.
    """
    rest = dict(params)
    if written and (seed := rest.get("sampling_seed")) is not None:
        rest["sampling_seed"] = continued_seed(seed, written)
    if least := rest.get("min_new_tokens"):
        rest["min_new_tokens"] = max(0, least - written)
    return rest


def cut_at_stop(
    answer: dict[str, Any], before: Sequence[int], stops: Sequence[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """`answer`, ended where a stop string ends that began in the tokens `before` it.

    The engine looks for stop strings in what one request writes, so it cannot see those.

    Args:
        answer: of the engine, to the rest.
        before: ids of the same answer that were written by earlier requests.
        stops: `stop` of the request.
    """
    meta: dict[str, Any] = answer["meta_info"]
    entries: list[list[Any]] = meta.get("output_token_logprobs") or []
    ids = [entry[1] for entry in entries]
    longest = max(map(len, stops), default=0)
    tail = list(before)[-longest:]  # a token has at least one character, or is part of one
    for count in range(1, min(len(ids), longest) + 1):
        text = tokenizer.decode(tail + ids[:count])
        own = tokenizer.decode(ids[:count])
        found = next((stop for stop in stops if stop in text and stop not in own), None)
        if found is not None:
            return _ended(answer, count, found)
    return answer


def _ended(answer: dict[str, Any], count: int, stop: str) -> dict[str, Any]:
    """`answer` with its first `count` tokens, ended by `stop`."""
    meta = answer["meta_info"] | {
        "output_token_logprobs": answer["meta_info"]["output_token_logprobs"][:count],
        "completion_tokens": count,
        "finish_reason": {"type": "stop", "matched": stop},
    }
    meta.pop("routed_experts", None)  # of tokens that are gone too; those that stay: not recorded
    ended = answer | {"meta_info": meta}
    if "output_ids" in ended:
        ended["output_ids"] = ended["output_ids"][:count]
    return ended
