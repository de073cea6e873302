"""Which neighbour a country shares its longest land border with, read from both sides.

A country's own page is split into neighbours and lengths, whose names have to be known. The second reading does not
use that page: it looks on all others for the country's names. What the two do not agree on is no fact.
"""

import re
from collections.abc import Iterable, Mapping

from factbook import Country, key_of

_LENGTH = r"([\d,]+(?:\.\d+)?)\s*km"
# "China (southeast) 4,133 km", "Hungary 128 km": a name, perhaps with the part of it, and a length.
_ENTRY = re.compile(r"([A-Z][^\d;]*?)\s*(?:\([^()]*\)\s*)?" + _LENGTH)
_NOTES = re.compile(r"\([^()]*\d[^()]*\)")  # "(of which 225 km ...)"


class NoFact(Exception):
    """Nothing certain can be said; `reason` is the same for all of a kind."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Borders:
    """The borders of all pages.

    Raises:
        ValueError: a name belongs to two countries.
    """

    def __init__(self, known: Iterable[Country]) -> None:
        self._countries = {country.code: country for country in known}
        self._codes: dict[str, str] = {}
        for country in self._countries.values():
            for name in country.names:
                if self._codes.setdefault(key_of(name), country.code) != country.code:
                    raise ValueError(
                        f"{name!r} is a name of {country.code} and of {self._codes[key_of(name)]}"
                    )

    def longest(self, country: Country) -> str:
        """Code of the neighbour with the longest border.

        Raises:
            NoFact: there is no border, a name is unknown, two are longest, or the other pages say
                something else.
        """
        own = self.own_side(country)
        best = _longest(own)
        others = self.other_side(country)
        if best not in others:
            raise NoFact("the neighbour's page does not name the border")
        if others[best] != own[best]:
            raise NoFact("the two pages tell different lengths")
        if _longest(others) != best:
            raise NoFact("on the other pages another border is longer")
        return best

    def own_side(self, country: Country) -> dict[str, float]:
        """Neighbour's code -> km, from the country's own page.

        Raises:
            NoFact: there is none, or a name is unknown.
        """
        told = _NOTES.sub("", _told(country))
        if not told:
            raise NoFact("no land border")
        entries = list(_ENTRY.finditer(told))
        if len(entries) != len(re.findall(_LENGTH, told)):
            raise NoFact("a border could not be read")
        found: dict[str, float] = {}
        for match in entries:
            code = self._codes.get(key_of(match[1]))
            if code is None:
                raise NoFact("a neighbour's name is unknown")
            found[code] = found.get(code, 0.0) + _km(match[2])
        return found

    def other_side(self, country: Country) -> Mapping[str, float]:
        """Neighbour's code -> km, from every page but the country's own."""
        names = sorted({re.escape(name) for name in country.names}, key=len, reverse=True)
        # Not within a longer name: "Guinea" in "Guinea-Bissau" or "Equatorial Guinea", "Congo" in another's.
        named = re.compile(
            rf"(?:^|[;,]\s*|\band\s+)(?:the\s+)?(?:{'|'.join(names)})\s*(?:\([^()]*\)\s*)?{_LENGTH}",
            re.IGNORECASE,
        )
        found: dict[str, float] = {}
        for other in self._countries.values():
            if other.code != country.code and (lengths := named.findall(_told(other))):
                found[other.code] = sum(map(_km, lengths))
        return found


def _told(country: Country) -> str:
    return country.text("Geography", "Land boundaries", "border countries")


def _km(text: str) -> float:
    return float(text.replace(",", ""))


def _longest(lengths: Mapping[str, float]) -> str:
    """Raises NoFact if there are two."""
    if not lengths:
        raise NoFact("the neighbour's page does not name the border")
    most = max(lengths.values())
    best = [code for code, km in lengths.items() if km == most]
    if len(best) > 1:
        raise NoFact("two borders are longest")
    return best[0]
