"""A board behind OpenEnv's own server (openenv-core 0.3.0): python openenv_server.py PORT"""

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    message: str


class Told(Observation):
    text: str


class Board(Environment[Guess, Told, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._number, self._steps = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Told:
        self._number, self._steps = (seed or 0) % 10, 0
        return Told(text=f"0 to {more.get('most', 9)}?")

    def step(self, action: Guess, timeout_s: float | None = None, **more: Any) -> Told:
        self._steps += 1
        guess = int(action.message)
        if guess == self._number:
            return Told(text="yes", reward=1.0, done=True)
        return Told(text="higher" if guess < self._number else "lower", reward=-0.5)

    @property
    def state(self) -> State:
        return State(episode_id="board", step_count=self._steps)


if __name__ == "__main__":
    app = create_fastapi_app(Board, Guess, Told, max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
