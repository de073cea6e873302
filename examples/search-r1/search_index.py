"""Full-text search over passages: SQLite's FTS5, which comes with Python."""

import re
import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from factbook import Passage, plain

# Of title, other names, field and text: "capital of Chad" means the page Chad and the field Capital. That passage is
# among the first three for all 234 countries (border_questions.py counts it).
WEIGHTS = (10.0, 10.0, 20.0, 1.0)
_ASKING = "how what when where which who whose"
_JOINING = "a an and are as at be by for from in is it its of on or that the this to was with"
STOP_WORDS = frozenset(f"{_ASKING} {_JOINING}".split())
# SQLite asks whether to go on after so many of its instructions.
_INSTRUCTIONS = 10_000


@dataclass(frozen=True)
class Hit:
    """A passage and how well it fits; larger is better."""

    passage: Passage
    score: float


class SearchDeadline(Exception):
    """A search was not done in time."""


class SearchIndex:
    """Passages in memory, searched by any number of threads, each of which has its own copy.

    Raises:
        ValueError: no passages, or two of one id.
    """

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._passages = list(passages)
        if not self._passages:
            raise ValueError("there are no passages to search")
        ids = {passage.id for passage in self._passages}
        if len(ids) < len(self._passages):
            raise ValueError(
                f"{len(self._passages)} passages have {len(ids)} ids; give each its own"
            )
        made = sqlite3.connect(":memory:")
        made.execute(
            "create virtual table found using fts5(title, names, field, body, tokenize='porter')"
        )
        rows = ((p.title, p.names, p.field, plain(p.text)) for p in self._passages)
        made.executemany("insert into found values (?, ?, ?, ?)", rows)
        made.commit()
        self._image = made.serialize()
        made.close()
        self._thread = threading.local()

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, topk: int, *, deadline_s: float = 5.0) -> list[Hit]:
        """The best `topk` passages, best first; none if the query has but stop words.

        Raises:
            SearchDeadline: it took longer than `deadline_s` seconds.
        """
        words = dict.fromkeys(re.findall(r"\w+", plain(query).lower()))
        wanted = [word for word in words if word not in STOP_WORDS]
        if not wanted:
            return []
        connection = self._connection()
        end = time.monotonic() + deadline_s
        connection.set_progress_handler(lambda: time.monotonic() > end, _INSTRUCTIONS)
        # Words in quotation marks are words, whatever FTS5 would read in them.
        match = " OR ".join(f'"{word}"' for word in wanted)
        try:
            rows = connection.execute(
                "select rowid, bm25(found, ?, ?, ?, ?) as badness from found where found match ? "
                "order by badness, rowid limit ?",
                (*WEIGHTS, match, topk),
            ).fetchall()
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            raise SearchDeadline(
                f"search of {len(wanted)} words took longer than {deadline_s:g} s"
            ) from error
        return [Hit(self._passages[rowid - 1], -badness) for rowid, badness in rows]

    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._thread, "connection"):
            connection = sqlite3.connect(":memory:")
            connection.deserialize(self._image)
            self._thread.connection = connection
        return self._thread.connection
