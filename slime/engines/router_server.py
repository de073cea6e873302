"""The router as a process: `python -m slime.engines.router_server --host ... --port ...`.

It is `smg launch` with the API key taken from the environment: on a command line every user of the
machine could read it.
"""

import runpy
import sys
from collections.abc import Sequence

from slime.config.api_key import run_api_key


def smg_argv(words: Sequence[str]) -> list[str]:
    """The words of `smg launch`, with the run's key unless they bring one."""
    key = run_api_key()
    has_own = any(word == "--api-key" or word.startswith("--api-key=") for word in words)
    # One word: a key may begin with a dash.
    return ["smg", "launch", *words, *([f"--api-key={key}"] if key and not has_own else [])]


if __name__ == "__main__":
    sys.argv = smg_argv(sys.argv[1:])
    runpy.run_module("smg", run_name="__main__")
