"""The endpoint for agents under many conversations at once: is each there, token for token, and what does it cost?

Conversations of several turns with a tool run at the same time through the endpoint, in front of a **fake
engine** in a process of its own, which writes tokens that depend on the prompt alone and takes a given time
for each answer. Their clients are a third process. Afterwards each trajectory is built again from the chat
template and the fake engine's rule, and compared. The same clients then ask the fake engine directly, in the
same rhythm: the difference is the endpoint's.

Example: python benchmarks/agent_endpoint.py --conversations 1000 --turns 5
"""

import argparse
import asyncio
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import aiohttp
import numpy as np
from aiohttp import web
from support.agent_world import END, PARAMETERS, TEMPLATE
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.agent import Session, agent_session
from slime.data.chat import Message, load_tokenizer, render, token_ids
from slime.data.sample import Sample
from slime.engines.request_scope import request_scope
from slime.engines.servers import allow_open_files
from slime.observability.garbage import settle_memory
from slime.rollout.state import GenerateState

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS},
}
QUESTION = "How many stars are there? " * 8
RESULT = "Result of the tool: " + "0123456789" * 10


def fake_answer(prompt: Sequence[int], tokenizer: Any) -> list[int]:
    """Ids that depend on `prompt` alone: words, and a call of the tool, written letter by letter."""
    number = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
    words = f"Thought {number}. " * (1 + number % 4)
    call = json.dumps({"name": "add", "arguments": {"a": number % 100, "b": 3}})
    ids = token_ids(tokenizer, f"{words}<tool_call>{call}</tool_call>{END}")
    if number % 3:
        return ids
    # The same text in other tokens than a tokenizer would write it in.
    spelled = [token for letter in "<think>" for token in token_ids(tokenizer, letter)]
    return spelled + ids


def fake_seconds(prompt: Sequence[int], mean_s: float) -> float:
    """Of an answer: between a third and five thirds of the mean."""
    share = zlib.crc32(np.asarray(prompt, np.int32).tobytes()) % 1000 / 1000
    return mean_s * (1 / 3 + share * 4 / 3)


def fake_engine(folder: str, mean_s: float, link: Connection) -> None:
    """Process: an HTTP server that speaks /generate; sends its port."""
    allow_open_files()
    tokenizer = load_tokenizer(folder)

    async def generate(http: web.Request) -> web.Response:
        started = time.monotonic()
        payload = json.loads(await http.read())
        prompt: list[int] = payload["input_ids"]
        ids = fake_answer(prompt, tokenizer)
        await asyncio.sleep(fake_seconds(prompt, mean_s))
        meta = {
            "id": "fake",
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "weight_version": "1",
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "e2e_latency": time.monotonic() - started,
        }
        return web.json_response({"text": "", "output_ids": ids, "meta_info": meta})

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 28)
        app.add_routes([web.post("/generate", generate)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        link.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(serve())


def clients(link: Connection) -> None:
    """Process: runs the conversations it is told of, all at once; sends seconds and messages."""
    allow_open_files()
    while (work := link.recv()) is not None:
        link.send(asyncio.run(_run_all(*work)))


async def _run_all(kind: str, places: list[Any], turns: int) -> dict[str, Any]:
    talk = _talk if kind == "endpoint" else _talk_directly
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    seconds: list[tuple[int, float]] = []
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        started = time.monotonic()
        told = await asyncio.gather(*(talk(http, place, turns, seconds) for place in places))
        wall_s = time.monotonic() - started
    return {"seconds": seconds, "messages": told, "wall_s": wall_s}


async def _talk(
    http: aiohttp.ClientSession, place: Any, turns: int, seconds: list[tuple[int, float]]
) -> list[Message]:
    """One conversation on chat completions; an error of any kind ends all."""
    number, url, key = place
    messages: list[Message] = [{"role": "user", "content": f"{number}: {QUESTION}"}]
    for turn in range(turns):
        body = {"model": "any", "messages": messages, "tools": [TOOL]}
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {key}"}
        async with http.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            message = (await answer.json())["choices"][0]["message"]
        seconds.append((turn, time.monotonic() - started))
        messages.append(message)
        if turn < turns - 1:
            call_id = message["tool_calls"][0]["id"]
            messages.append({"role": "tool", "tool_call_id": call_id, "content": RESULT})
    return messages


async def _talk_directly(
    http: aiohttp.ClientSession, prompts: Any, turns: int, seconds: list[tuple[int, float]]
) -> list[Message]:
    """The same requests at the fake engine, as the endpoint sent them."""
    url, requests = prompts
    for turn, prompt in enumerate(requests):
        body = {"input_ids": prompt, "sampling_params": {}, "return_logprob": True}
        started = time.monotonic()
        async with http.post(f"{url}/generate", json=body) as answer:
            answer.raise_for_status()
            await answer.json()
        seconds.append((turn, time.monotonic() - started))
    return []


async def through_endpoint(
    args: Any, link: Connection, conversations: int, turns: int
) -> tuple[dict[str, Any], list[Session]]:
    """What the clients measured, and the sessions."""
    sessions: list[Session] = []
    async with AsyncExitStack() as stack:
        params = GenerateState(args).sampling_params
        for number in range(conversations):
            sample = Sample(index=number, group_index=number // 8, session_id=f"{number:032x}")
            with request_scope(number):
                session = agent_session(args, sample, params)
                sessions.append(await stack.enter_async_context(session))
        places = [
            (number, session.openai_base_url, session.api_key)
            for number, session in enumerate(sessions)
        ]
        link.send(("endpoint", places, turns))
        measured = await asyncio.to_thread(link.recv)
    await GenerateState(args).client.aclose()
    return measured, sessions


def expected_tokens(number: int, turns: int, tokenizer: Any) -> list[list[int]]:
    """Ids of a conversation in front of each answer and at its end, by template and rule alone."""
    asked: Message = {"role": "user", "content": f"{number}: {QUESTION}"}
    said: list[Message] = [asked]
    pieces: list[list[int]] = []
    written: list[list[int]] = []
    for turn in range(turns):
        text = render(tokenizer, said, where="benchmark", tools=[TOOL])
        ids: list[int] = []
        for answer_number, answer in enumerate(written):
            before, _, text = text.partition(f"ANSWER{answer_number}.")
            ids += token_ids(tokenizer, before) + answer
            text = text.removeprefix(END)
        ids += token_ids(tokenizer, text)
        pieces.append(ids)
        written.append(fake_answer(ids, tokenizer))
        said.append({"role": "assistant", "content": f"ANSWER{turn}."})
        said.append({"role": "tool", "content": RESULT})
    return [*pieces, pieces[-1] + written[-1]]


def percentiles(seconds: Sequence[tuple[int, float]], *, first: bool) -> dict[str, float]:
    """Of the first turns, which all come at once, or of the others."""
    p50, p99 = np.percentile([s for turn, s in seconds if (turn == 0) == first], [50, 99])
    return {"p50_s": round(float(p50), 4), "p99_s": round(float(p99), 4)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--engine-seconds", type=float, default=6.0, help="mean of an answer")
    given = parser.parse_args()
    allow_open_files()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_char_tokenizer(folder, chat_template=TEMPLATE)
        engine_link, engine_end = spawn.Pipe()
        link, client_end = spawn.Pipe()
        engine = spawn.Process(target=fake_engine, args=(folder, given.engine_seconds, engine_end))
        agents = spawn.Process(target=clients, args=(client_end,))
        engine.start()
        agents.start()
        try:
            result = _measure(given, folder, engine_link.recv(), link)
            sys.stdout.write(json.dumps(result, indent=2) + "\n")
        finally:
            link.send(None)
            engine.terminate()
            engine.join()
            agents.join()


def _measure(given: argparse.Namespace, folder: str, port: int, link: Connection) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    args = make_args(
        url,
        hf_checkpoint=folder,
        rollout_max_response_len=100_000,
        request_timeout_s=600.0,
        sglang_server_concurrency=4 * given.conversations,
    )
    tokenizer = GenerateState(args).tokenizer
    render(tokenizer, [{"role": "user", "content": "a"}], where="benchmark", tools=[TOOL])
    settle_memory()  # as the rollout's process does when it has started
    rss_before = _rss_mb()
    cpu_before = time.process_time()
    measured, sessions = asyncio.run(through_endpoint(args, link, given.conversations, given.turns))
    cpu_s = time.process_time() - cpu_before
    rss_after = _rss_mb()
    exact, num_tokens, direct = 0, 0, list[Any]()
    for number, session in enumerate(sessions):
        [sample] = session.samples()
        *prompts, whole = expected_tokens(number, given.turns, tokenizer)
        mask = sample.loss_mask or []
        trained = sum(len(fake_answer(prompt, tokenizer)) for prompt in prompts)
        exact += sample.tokens == whole and sum(mask) == trained
        num_tokens += len(sample.tokens)
        direct.append((url, prompts))
    link.send(("direct", direct, given.turns))
    alone = link.recv()
    seconds, own = measured["seconds"], alone["seconds"]
    return {
        "engine": "fake: answers by rule, in a given time",
        "conversations": given.conversations,
        "turns": given.turns,
        "engine_seconds_mean": given.engine_seconds,
        "lost": given.conversations * given.turns - len(seconds),
        "token_exact": exact,
        "tokens_per_conversation": round(num_tokens / given.conversations),
        "wall_s": round(measured["wall_s"], 2),
        "conversations_per_s": round(given.conversations / measured["wall_s"], 1),
        "requests_per_s": round(len(seconds) / measured["wall_s"], 1),
        "first_turn": percentiles(seconds, first=True),
        "first_turn_without_endpoint": percentiles(own, first=True),
        "later_turns": percentiles(seconds, first=False),
        "later_turns_without_endpoint": percentiles(own, first=False),
        "wall_without_endpoint_s": round(alone["wall_s"], 2),
        "endpoint_cpu_ms_per_request": round(1000 * cpu_s / len(seconds), 2),
        "memory_mb_before": rss_before,
        "memory_mb_peak": rss_after,
        "memory_kb_per_conversation": round((rss_after - rss_before) * 1024 / given.conversations),
        "python": platform.python_version(),
    }


def _rss_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
