"""Environments behind an OpenEnv server: --environment-path slime.environments.openenv.OpenEnv.

Each episode has a session of its own on the server: a WebSocket at `/ws`, over which JSON goes. OpenEnv's own client
says the same, but its package (openenv-core 0.3.0) wants another version of openai than SGLang 0.5.17 does, so the
two cannot be installed together; here nothing has to be.

Source: messages and their fields as in openenv-core 0.3.0, whose server tests/unit/environments/test_openenv.py runs
where it is at hand.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp

from slime.environments.interface import INVALID_ACTION, Observation, Step
from slime.environments.settings import checked_settings
from slime.errors import ConfigError, EpisodeError
from slime.plugins import load_function

MAX_MESSAGE_BYTES = 100 * 2**20  # as OpenEnv's client


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What --environment-args may have.

    Attributes:
        url: of the server, http:// or ws://.
        action: name of the action's field that gets the model's text, such as "message"; without it the text has to
            be a JSON object, the action itself.
        observation: name of the observation's field that is told; without it the whole is told as JSON.
        act, observe: dotted paths instead of these: fn(text) -> dict, which raises ValueError where there is no
            action; fn(observation) -> text or messages.
        reset: for the server's reset() besides the seed.
        invalid_reward: of a turn without an action, which the server does not see.
    """

    url: str
    action: str | None = None
    observation: str | None = None
    act: str | None = None
    observe: str | None = None
    reset: dict[str, Any] = field(default_factory=dict[str, Any])
    invalid_reward: float = 0.0


class OpenEnv:
    """One episode on an OpenEnv server.

    Args:
        settings: as `Settings`.

    Raises:
        ConfigError: a setting is unknown, or there is no url.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = chosen = checked_settings(Settings, settings, "openenv")
        if not isinstance(cast(Any, chosen.url), str) or "://" not in chosen.url:
            raise ConfigError(
                '--environment-args: url must be like "http://127.0.0.1:8000", found '
                f"{chosen.url!r}"
            )
        self._act: Callable[[str], dict[str, Any]] = (
            _action_in(chosen.action) if chosen.act is None else load_function(chosen.act)
        )
        self._observe: Callable[[dict[str, Any]], Observation] = (
            _told_by(chosen.observation)
            if chosen.observe is None
            else load_function(chosen.observe)
        )
        self._client: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def reset(self, seed: int) -> Observation:
        """The first observation as text.

        Raises:
            EpisodeError: the server refuses. OSError: it cannot be reached.
        """
        answer = await self._ask("reset", {"seed": seed, **self._settings.reset})
        return self._observe(answer["observation"])

    async def step(self, text: str) -> Step:
        """What the server answers to the action in `text`.

        Raises: as `reset`.
        """
        try:
            action = self._act(text)
        except ValueError as error:
            told = f"That is no action: {error}."
            return Step(told, self._settings.invalid_reward, info={INVALID_ACTION: True})
        answer = await self._ask("step", action)
        # A reward that the server leaves out counts nothing.
        return Step(
            self._observe(answer["observation"]), answer.get("reward") or 0.0, bool(answer["done"])
        )

    async def state(self) -> dict[str, Any]:
        """What the server tells about the session.

        Raises: as `reset`.
        """
        return await self._ask("state", None)

    async def close(self) -> None:
        """End the session."""
        try:
            if self._socket is not None and not self._socket.closed:
                await self._socket.send_json({"type": "close"})
                await self._socket.close()
        finally:
            if self._client is not None:
                await self._client.close()

    async def _ask(self, kind: str, data: Mapping[str, Any] | None) -> dict[str, Any]:
        socket = await self._connected()
        await socket.send_json({"type": kind} if data is None else {"type": kind, "data": data})
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise EpisodeError(
                f"{self._settings.url} ended the session ({message.type.name} {message.data!r:.80})"
            )
        answer = cast(dict[str, Any], json.loads(message.data))
        content = cast(dict[str, Any], answer.get("data", {}))
        if answer.get("type") == "error":
            raise EpisodeError(f"{content.get('code')}: {content.get('message')}")
        if kind != "state" and not {"observation", "done"} <= content.keys():
            raise EpisodeError(
                f"{self._settings.url} answered {message.data[:80]!r}, which has no observation"
            )
        return content

    async def _connected(self) -> aiohttp.ClientWebSocketResponse:
        if self._socket is None:
            self._client = aiohttp.ClientSession()
            url = self._settings.url.rstrip("/") + "/ws"
            self._socket = await self._client.ws_connect(url, max_msg_size=MAX_MESSAGE_BYTES)
        return self._socket


def _action_in(name: str | None) -> Callable[[str], dict[str, Any]]:
    def whole(text: str) -> dict[str, Any]:
        try:
            action = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(action, dict):
            raise ValueError("it is no JSON object")
        return cast(dict[str, Any], action)

    return whole if name is None else lambda text: {name: text}


def _told_by(name: str | None) -> Callable[[dict[str, Any]], Observation]:
    def field_of(observation: dict[str, Any]) -> Observation:
        if name not in observation:
            raise EpisodeError(
                f"the observation has no {name!r}, it has {', '.join(sorted(observation))}"
            )
        return str(observation[name])

    return _as_json if name is None else field_of


def _as_json(observation: dict[str, Any]) -> Observation:
    return json.dumps(observation, ensure_ascii=False)
