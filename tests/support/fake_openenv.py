"""A fake of OpenEnv's server: the board of openenv_server.py over aiohttp. python fake_openenv.py PORT"""

import json
import sys
from typing import Any

from aiohttp import web


async def session(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    number = steps = 0

    async def tell(text: str, reward: float | None = None, done: bool = False) -> None:
        data = {"observation": {"text": text}, "reward": reward, "done": done}
        await socket.send_json({"type": "observation", "data": data})

    async for message in socket:
        asked: dict[str, Any] = json.loads(message.data)
        data = asked.get("data", {})
        if asked["type"] == "reset":
            number, steps = data.get("seed", 0) % 10, 0
            await tell(f"0 to {data.get('most', 9)}?")
        elif asked["type"] == "state":
            await socket.send_json({"type": "state", "data": {"step_count": steps}})
        elif asked["type"] == "close":
            break
        else:
            try:
                guess = int(data["message"])
            except ValueError as error:
                told = {"message": str(error), "code": "EXECUTION_ERROR"}
                await socket.send_json({"type": "error", "data": told})
                continue
            steps += 1
            if guess == number:
                await tell("yes", 1.0, True)
            else:
                await tell("higher" if guess < number else "lower", -0.5)
    return socket


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/ws", session)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
