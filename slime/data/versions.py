"""Which weights wrote which tokens of a response: spans of weight versions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from slime.errors import EngineProtocolError

Span = tuple[int, str]

# Versions that are no version. Tokens that no engine wrote: what tools said.
NOBODY = ""
# An engine wrote them and did not say with which weights.
UNKNOWN = "?"
_TO = ".."


def mixed_version(first: str, last: str) -> str:
    """Stands for tokens written while weights went from `first` to `last`, the split not being known.

    Example: "3..4".
    """
    return f"{first}{_TO}{last}"


def extended_spans(
    spans: Sequence[Span], length: int, added: Sequence[Span], num_added: int
) -> list[Span]:
    """Spans of a response of `length` tokens after `num_added` more.

    Args:
        spans: of the tokens before.
        added: of the new tokens, counted from the first of them.
    """
    whole = list(spans)
    if length and not whole:
        whole.append((0, UNKNOWN))  # somebody filled in the tokens by hand
    ends = [first for first, _ in added[1:]]
    for (first, version), end in zip(added, [*ends, num_added], strict=True):
        wrote_any = first < min(end, num_added)
        if wrote_any and (not whole or whole[-1][1] != version):
            whole.append((length + first, version))
    return whole


def spans_of_answer(
    meta_info: Mapping[str, Any],
    *,
    trainable: bool = True,
    pause_mode: str | None = None,
    sent_under: str | None = None,
) -> list[Span]:
    """Spans of what is appended, from the `meta_info` of the engine's answer.

    `weight_versions`, where there is one, lists `[version, first token]`: the embedded engine knows.
    SGLang's `weight_version` names the weights at the answer's end. With pauses that let requests go
    on, those at its beginning are the newest that were known when it left, or newer; unless SGLang
    says that it did not retract the request.

    Args:
        trainable: False for what no engine wrote, unless `meta_info` names a version.
        pause_mode: `--update-weight-pause-mode`.
        sent_under: newest version that was known when the request left.

    Raises:
        EngineProtocolError: the list is no list of spans.
    """
    if (listed := meta_info.get("weight_versions")) is not None:
        check_listed(listed)
        return [(first, str(version)) for version, first in listed]
    if meta_info.get("weight_version") is None:
        return [(0, UNKNOWN if trainable else NOBODY)]
    version = str(meta_info["weight_version"])
    was_retracted = pause_mode == "retract" and meta_info.get("num_retractions") != 0
    if sent_under == version or not (was_retracted or pause_mode == "in_place"):
        return [(0, version)]
    return [(0, mixed_version(sent_under or UNKNOWN, version))]


def check_listed(listed: Any) -> None:
    """Nothing, when `listed` is a list of `[version, first token]` that begins with token 0.

    Raises:
        EngineProtocolError: it is something else.
    """
    firsts = list[int]()
    for entry in cast(list[Any], listed) if isinstance(listed, list) else []:
        match entry:
            case [str() | int(), int() as first]:
                firsts.append(first)
            case _:
                firsts.clear()
                break
    # Equal ones: the earlier version wrote nothing.
    if not firsts or firsts[0] != 0 or firsts != sorted(firsts):
        raise EngineProtocolError(
            "weight_versions must be a list of [version, first token] that begins with token 0, "
            f"found {listed!r:.120}"
        )


def last_begin(spans: Sequence[Span], length: int) -> int:
    """First token of what engines wrote last, after the last tool output; of `length` tokens."""
    begin = length
    for first, version in reversed(spans):
        if version == NOBODY:
            return begin
        begin = first
    return 0


def versions_in(spans: Iterable[Span]) -> Iterator[str]:
    """Versions that wrote at least a part, both ends of those whose split is not known."""
    for _, version in spans:
        if _TO in version:
            yield from (part for part in version.split(_TO) if part not in (NOBODY, UNKNOWN))
        elif version not in (NOBODY, UNKNOWN):
            yield version


def num_policies(spans: Iterable[Span]) -> int:
    """How many versions wrote a part, as far as they are named."""
    return len(set(versions_in(spans)))


def is_split_unknown(spans: Iterable[Span]) -> bool:
    """Whether a part was written by several versions, and nobody knows which of them wrote what."""
    return any(_TO in version for _, version in spans)
