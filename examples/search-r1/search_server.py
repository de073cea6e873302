"""A search server over the World Factbook, or over passages of your own, with the interface of Search-R1's.

    python search_server.py [--port 8000] [--corpus passages.jsonl]

POST /retrieve {"queries": ["capital of Chad", ...], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "cd/Government/Capital", "contents": "..."}, "score": 9.1}, ...], ...]}
       A list for each query, best first; documents alone without `return_scores`. `contents` is the title in quotation
       marks, the end of a line, and the text.
GET /health -> {"documents": 32396}
"""

import argparse
import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web
from factbook import countries, data_folder, passages, read_corpus
from search_index import Hit, SearchDeadline, SearchIndex

logger = logging.getLogger("search_server")

DEFAULT_TOPK, MAX_TOPK = 3, 100
MAX_QUERIES, MAX_QUERY_CHARACTERS = 1024, 2000
NAMES = ("queries", "topk", "return_scores")


class BadRequest(Exception):
    """What the body has that it must not have."""


class SearchServer:
    """The application.

    Args:
        index: what is searched.
        threads: searches at the same time.
        deadline_s: of one request, with the time it waits for a thread.
    """

    def __init__(self, index: SearchIndex, *, threads: int = 2, deadline_s: float = 20.0) -> None:
        self._index = index
        self._deadline_s = deadline_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="search")

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 23)
        app.add_routes([web.post("/retrieve", self._retrieve), web.get("/health", self._health)])
        app.on_cleanup.append(self._close)
        return app

    async def _retrieve(self, request: web.Request) -> web.Response:
        try:
            queries, topk, scores = checked(json.loads(await request.read()))
        except ValueError as error:
            return _error(400, f"the body is no JSON: {error}")
        except BadRequest as error:
            return _error(400, str(error))
        loop = asyncio.get_running_loop()
        found = [
            loop.run_in_executor(self._threads, self._search, query, topk) for query in queries
        ]
        try:
            async with asyncio.timeout(self._deadline_s):
                results = await asyncio.gather(*found)
        except (TimeoutError, SearchDeadline):
            for search in found:
                search.cancel()
            return _error(
                504,
                f"{len(queries)} queries took longer than {self._deadline_s:g} s (--deadline-s); send fewer at once",
            )
        return web.json_response(
            {"result": [[_document(hit, scores) for hit in hits] for hits in results]}
        )

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"documents": len(self._index)})

    async def _close(self, app: web.Application) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _search(self, query: str, topk: int) -> list[Hit]:
        return self._index.search(query, topk, deadline_s=self._deadline_s)


def checked(body: Any) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores) of a request's body.

    Raises:
        BadRequest: something has another type or size, or another name.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"the body is {_kind(body)}, not an object with {', '.join(NAMES)}")
    if unknown := sorted(set(body) - set(NAMES)):
        raise BadRequest(f"{', '.join(unknown)} is unknown; there are {', '.join(NAMES)}")
    queries = body.get("queries")
    if not isinstance(queries, list) or not 1 <= len(queries) <= MAX_QUERIES:
        number = len(queries) if isinstance(queries, list) else _kind(queries)
        raise BadRequest(f"queries is {number}, not a list of 1 to {MAX_QUERIES} texts")
    for i, query in enumerate(queries):
        if not isinstance(query, str):
            raise BadRequest(f"queries[{i}] is {_kind(query)}, not text")
        if len(query) > MAX_QUERY_CHARACTERS:
            raise BadRequest(
                f"queries[{i}] has {len(query)} characters, more than {MAX_QUERY_CHARACTERS}"
            )
    topk = body.get("topk")
    topk = DEFAULT_TOPK if topk is None else topk
    if type(topk) is not int or not 1 <= topk <= MAX_TOPK:
        raise BadRequest(f"topk is {topk!r}, not a number from 1 to {MAX_TOPK}")
    scores = body.get("return_scores", False)
    if type(scores) is not bool:
        raise BadRequest(f"return_scores is {scores!r}, not true or false")
    return queries, topk, scores


def _document(hit: Hit, scores: bool) -> dict[str, Any]:
    found = hit.passage
    text = f"{found.field}: {found.text}" if found.field else found.text
    document = {"id": found.id, "contents": f'"{found.title}"\n{text}'}
    return {"document": document, "score": hit.score} if scores else document


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def serve(
    server: SearchServer, host: str, port: int, listening: Callable[[str], object]
) -> None:
    """Answer until cancelled; `listening` gets the address once it does."""
    runner = web.AppRunner(server.app())
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        listening(f"http://{host}:{runner.addresses[0][1]}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Read the passages and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="others than this machine need another")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one; default 8000")
    parser.add_argument("--url-file", type=Path, help="file that gets the address once it answers")
    parser.add_argument("--corpus", type=Path, help="passages instead of the World Factbook's")
    parser.add_argument("--threads", type=int, default=2, help="searches at the same time")
    parser.add_argument("--deadline-s", type=float, default=20.0, help="seconds a request may take")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    corpus = (
        read_corpus(options.corpus)
        if options.corpus
        else list(passages(countries(data_folder()).values()))
    )
    index = SearchIndex(corpus)
    logger.info("%d passages", len(index))
    server = SearchServer(index, threads=options.threads, deadline_s=options.deadline_s)

    def listening(url: str) -> None:
        logger.info("answers at %s/retrieve", url)
        if options.url_file:
            options.url_file.write_text(url)

    try:
        asyncio.run(serve(server, options.host, options.port, listening))
    except KeyboardInterrupt:
        logger.info("stopped")
    except OSError as error:
        raise SystemExit(
            f"cannot listen at {options.host}:{options.port}: {error}; try --port 0"
        ) from error


if __name__ == "__main__":
    main()
