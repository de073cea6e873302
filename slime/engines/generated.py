"""What an engine answered to /generate, read with suspicion: an answer becomes training data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from slime.data.versions import check_listed
from slime.errors import EngineProtocolError

# A probability is at most 1; the rest is rounding of half-precision engines.
MOST_LOG_PROB = 0.01
_COUNTERS = (
    *("prompt_tokens", "completion_tokens", "cached_tokens", "routed_experts_start_len"),
    *("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct"),
)


@dataclass(frozen=True)
class Limits:
    """What an answer must keep to; None: not known.

    Attributes:
        max_new_tokens: most tokens that were asked for.
        vocab_size: rows of the model's embedding; ids are below it.
    """

    max_new_tokens: int | None = None
    vocab_size: int | None = None


def output_ids(answer: Mapping[str, Any], limits: Limits, *, where: str) -> list[int]:
    """Ids of the answer, read beside their log-probs so that the two cannot part.

    Args:
        where: names the call in messages.

    Raises:
        EngineProtocolError: something in the answer cannot be, such as an id outside the
            vocabulary, a log-prob that is no number, or more tokens than were asked for.
    """
    meta_info: Mapping[str, Any] = answer["meta_info"]
    try:
        _check_counters(meta_info)
        ids = _ids(meta_info.get("output_token_logprobs"), limits)
        _check_number(ids, meta_info, limits)
        _check_repeated(ids, answer)
    except _Wrong as wrong:
        raise EngineProtocolError(f"{where}: {wrong}") from None
    return ids


class _Wrong(Exception):
    """What is wrong with an answer."""


def _ids(entries: Any, limits: Limits) -> list[int]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise _Wrong(
            f"output_token_logprobs must be a list of [log_prob, id, text], found {entries!r:.120}"
        )
    if (ids := _plain_ids(cast(list[Any], entries), limits)) is not None:
        return ids
    ids = list[int]()
    for entry in cast(list[Any], entries):
        match entry:
            case [int() | float() as log_prob, int() as token, *_] if type(token) is int:
                _check_log_prob(log_prob, position=len(ids))
                _check_token(token, limits, position=len(ids))
                ids.append(token)
            case _:
                raise _Wrong(
                    "output_token_logprobs must be a list of [log_prob, id, text], found "
                    f"{entry!r:.120} at position {len(ids)}"
                )
    return ids


def _plain_ids(entries: list[Any], limits: Limits) -> list[int] | None:
    """The ids, when every entry is as it should be; None when one needs a closer look."""
    if not entries or set(map(type, entries)) != {list} or min(map(len, entries)) < 2:
        return None
    log_probs = [entry[0] for entry in entries]
    ids = [entry[1] for entry in entries]
    if set(map(type, log_probs)) != {float} or set(map(type, ids)) != {int}:
        return None
    # One that is no number, or infinite, makes the sum so too.
    if not math.isfinite(sum(log_probs)) or max(log_probs) > MOST_LOG_PROB:
        return None
    size = limits.vocab_size
    if min(ids) < 0 or (size is not None and max(ids) >= size):
        return None
    return ids


def _check_log_prob(value: float, *, position: int) -> None:
    if type(value) is bool or not math.isfinite(value) or value > MOST_LOG_PROB:
        raise _Wrong(
            f"log-prob {value!r} at position {position}; it must be a number of at most 0. Has "
            "the engine's model overflowed?"
        )


def _check_token(token: int, limits: Limits, *, position: int) -> None:
    if token < 0 or (limits.vocab_size is not None and token >= limits.vocab_size):
        size = limits.vocab_size
        raise _Wrong(
            f"token id {token} at position {position} is outside the vocabulary"
            + (f" of {size} ids; does the engine serve another model?" if size else "")
        )


def _check_number(ids: list[int], meta_info: Mapping[str, Any], limits: Limits) -> None:
    if not ids and meta_info.get("completion_tokens"):
        raise _Wrong(
            f"{meta_info['completion_tokens']} completion_tokens without output_token_logprobs; was "
            "return_logprob dropped on the way?"
        )
    if limits.max_new_tokens is not None and len(ids) > limits.max_new_tokens:
        raise _Wrong(f"{len(ids)} tokens, but at most {limits.max_new_tokens} were asked for")


def _check_repeated(ids: list[int], answer: Mapping[str, Any]) -> None:
    """`output_ids` and `text` must fit too, where an engine sends them."""
    repeated = answer.get("output_ids")
    if repeated is not None and repeated != ids:
        raise _Wrong(
            f"output_ids {repeated!r:.60} and the ids of output_token_logprobs {ids!r:.60} differ"
        )
    text = answer.get("text")
    if text is not None and not isinstance(text, str):
        raise _Wrong(f"text must be a string, found {text!r:.80}")


def _check_counters(meta_info: Mapping[str, Any]) -> None:
    for name in _COUNTERS:
        value = meta_info.get(name)
        if value is not None and (type(value) not in (int, float) or not value >= 0):
            raise _Wrong(f"{name} must be a number of at least 0, found {value!r:.80}")
    version = meta_info.get("weight_version")
    if version is not None and type(version) not in (str, int):
        raise _Wrong(f"weight_version must be a string, found {version!r:.80}")
    if (listed := meta_info.get("weight_versions")) is not None:
        try:
            check_listed(listed)
        except EngineProtocolError as error:
            raise _Wrong(str(error)) from None
