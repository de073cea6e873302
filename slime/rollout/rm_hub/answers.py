"""The answer in a response: after the thinking, in a box, behind a marker, or on the last line."""

import re

# Engines keep special tokens in the text unless told otherwise, so a response may end with one.
# \uff5c is the bar of DeepSeek's tokens.
_END_MARKS = re.compile(r"(?:\s*(?:<[|\uff5c][^<>\s]+[|\uff5c]>|</s>))+\s*$")
_MARKERS = re.compile(r"(?:####|(?:final\s+)?answer\s*(?:is\b:?|[:=]))[ \t*]*(\S.*)", re.IGNORECASE)
_INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def answer_part(response: str) -> str:
    """The response without its thinking and its end token; "" while the thinking is not closed."""
    text = _END_MARKS.sub("", response)
    _, closed, after = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return ""
    return (after if closed else text).strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...}; None if there is none or it never closes.

    Example:
        >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        return None
    depth = 1
    for position in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[starts[-1] : position].strip()
    return None


def final_answer(response: str) -> str | None:
    r"""The answer a response commits to; None if it has none.

    In this order: the last \boxed{}; what follows the last "####", "answer is" or "Answer:"; the
    last line. Of a line in words only its last formula or number counts. Thinking never counts.
    """
    text = answer_part(response)
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    lines = [match[1] for match in _MARKERS.finditer(text)] or text.splitlines()
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return _without_words(line.strip("*`").rstrip(".")) or None


def _without_words(line: str) -> str:
    if formulas := [next(filter(None, match.groups())) for match in _INLINE_MATH.finditer(line)]:
        return formulas[-1].strip()
    if _PROSE.search(line) and (numbers := _NUMBER.findall(line)):
        return numbers[-1].rstrip(",")
    return line
