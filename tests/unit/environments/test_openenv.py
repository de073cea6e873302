"""Episodes on a server of OpenEnv's kind: a fake, and OpenEnv's own.

That one runs where SLIME_OPENENV_PYTHON names a Python that has it. It cannot be in the tests' own environment, as
openenv-core 0.3.0 wants another openai than SGLang 0.5.17:

    uv venv OTHER && uv pip install --python OTHER/bin/python openenv-core==0.3.0
    SLIME_OPENENV_PYTHON=OTHER/bin/python pytest tests/unit/environments/test_openenv.py
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.environments.openenv import OpenEnv
from slime.errors import ConfigError, EpisodeError
from slime.rollout.base_types import flatten
from slime.rollout.groups import generate_and_rm
from slime.rollout.state import GenerateState

SUPPORT = Path(__file__).resolve().parents[2] / "support"


@pytest.fixture(scope="module", params=["fake_openenv.py", "openenv_server.py"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    python = sys.executable
    if request.param == "openenv_server.py":
        python = os.environ.get("SLIME_OPENENV_PYTHON", "")
        if not python:
            pytest.skip("SLIME_OPENENV_PYTHON names no Python with openenv-core")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([python, str(SUPPORT / request.param), str(port)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def settings(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "action": "message", "observation": "text"} | more


async def test_episodes_of_several_sessions_at_once(url: str):
    first, second = OpenEnv(settings(url)), OpenEnv(settings(url, reset={"most": 3}))
    assert await asyncio.gather(first.reset(4), second.reset(2)) == ["0 to 9?", "0 to 3?"]
    steps = await asyncio.gather(first.step("3"), second.step("3"))
    assert [(s.observation, s.reward, s.terminated) for s in steps] == [
        ("higher", -0.5, False),
        ("lower", -0.5, False),
    ]
    assert (await first.state())["step_count"] == 1
    won = await first.step("4")
    assert (won.reward, won.terminated) == (1.0, True)
    with pytest.raises(EpisodeError, match="EXECUTION_ERROR: invalid literal"):
        await second.step("a")
    await asyncio.gather(first.close(), second.close())


async def test_an_observation_without_the_named_field_is_an_error(url: str):
    board = OpenEnv(settings(url, observation="board"))
    with pytest.raises(EpisodeError, match="has no 'board', it has text"):
        await board.reset(0)
    await board.close()


async def test_without_names_actions_and_observations_are_json(url: str):
    board = OpenEnv({"url": url})
    assert '"text": "0 to 9?"' in str(await board.reset(0))
    invalid = await board.step("[0]")
    assert (invalid.observation, invalid.info) == (
        "That is no action: it is no JSON object.",
        {"invalid_action": True},
    )
    assert (await board.step('{"message": "0"}')).terminated
    await board.close()


@pytest.mark.parametrize(
    ("more", "error"),
    [({"url": "localhost:8000"}, "url must be like"), ({"uri": ""}, "did you mean 'url'")],
)
def test_bad_settings_stop_the_run(more: dict[str, Any], error: str):
    with pytest.raises(ConfigError, match=error):
        OpenEnv(settings("http://127.0.0.1:1") | more)


async def test_a_sample_plays_through_the_generate_function(url: str, tmp_path: Path):
    make_char_tokenizer(tmp_path)
    ids = load_tokenizer(str(tmp_path))("5<|im_end|>", add_special_tokens=False)["input_ids"]
    samples: list[Sample] = []
    async with fake_engine(lambda payload, number: Reply(ids=tuple(ids))) as engine:
        args = make_args(
            engine.url,
            hf_checkpoint=str(tmp_path),
            environment_path="slime.environments.openenv.OpenEnv",
            environment_args=settings(url),
            custom_generate_function_path="slime.environments.generate.generate",
            environment_max_turns=3,
            rollout_max_response_len=400,
        )
        params = GenerateState(args).sampling_params
        for changed in (
            {"seed": 15},
            {"seed": 6},
            {"environment_args": {"url": "ws://127.0.0.1:9"}},
        ):
            prompt = [{"role": "user", "content": "Guess."}]
            sample = Sample(index=1, prompt=prompt, metadata=changed)  # type: ignore[arg-type]
            samples += flatten([await generate_and_rm(args, sample, params)])
    right, wrong, lost = samples
    assert (right.status, right.reward) == (Sample.Status.COMPLETED, 1.0)
    assert (wrong.status, wrong.reward) == (Sample.Status.TRUNCATED, -1.5)
    assert lost.status is Sample.Status.FAILED
    assert (
        "reset raised ClientConnectorError: Cannot connect to host 127.0.0.1:9"
        in lost.metadata["error"]
    )
