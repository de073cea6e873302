"""Environments for --environment-path, each with a way of its own to answer or to fail."""

import asyncio
import sys
import threading
import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np

from slime.environments import Step

# What `Counting` saw: ("reset", seed, thread), ("step", text, thread), ("close", thread).
SEEN: list[tuple[Any, ...]] = []
_numbers = count()


class Counting:
    """Tells the number of the turn; ends after `turns` of them, the last of which earns a numpy 1.0."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.turns = settings.get("turns", 3)
        self.number = 0

    def reset(self, seed: int) -> str:
        SEEN.append(("reset", seed, threading.get_ident()))
        return "begin"

    def step(self, text: str) -> Step:
        SEEN.append(("step", text, threading.get_ident()))
        self.number += 1
        is_last = self.number == self.turns
        info = {"number": np.int64(self.number), "grid": np.zeros(2), "invalid_action": text == "x"}
        return Step(f"t{self.number}", np.float32(is_last) + 0.5, is_last, info=info)

    def close(self) -> None:
        SEEN.append(("close", threading.get_ident()))


class AsyncCounting(Counting):
    async def reset(self, seed: int) -> str:  # type: ignore[override]
        return super().reset(seed)

    async def step(self, text: str) -> Step:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().step(text)

    async def close(self) -> None:  # type: ignore[override]
        super().close()


class Unjudged(Counting):
    def step(self, text: str) -> Step:
        return Step("more", None, terminated=True)


class CutShort(Counting):
    def step(self, text: str) -> Step:
        return Step("more", 0.25, truncated=True)


class Forgetful(Counting):
    """Says something else each time it begins."""

    def reset(self, seed: int) -> str:
        super().reset(seed)
        return f"b{next(_numbers)}"


class Failing(Counting):
    """Fails as settings["how"] says."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.how = settings["how"]
        if self.how == "make":
            raise OSError("no board")

    def reset(self, seed: int) -> str:
        if self.how == "reset":
            raise OSError("no board")
        return super().reset(seed)

    def step(self, text: str) -> Step:
        match self.how:
            case "raise":
                raise ZeroDivisionError("no board")
            case "exit":
                sys.exit(3)
            case "stop":
                next(iter(()))
            case "hang":
                time.sleep(1)
            case "nan":
                return Step("", float("nan"))
            case "text":
                return "no step"  # type: ignore[return-value]
            case "observation":
                return Step(7)  # type: ignore[arg-type]
            case "close":
                return Step("", 1.0, terminated=True)
        raise AssertionError(self.how)

    def close(self) -> None:
        super().close()
        if self.how == "close":
            raise OSError("cannot close")
