"""The API key of a run: one secret that router and engines ask every caller for.

It travels in the environment, `SLIME_API_KEY`: other users of a machine can read the command line
of a process, but not its environment. No file of the run folder holds it.
"""

import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from slime.config.config import Config
from slime.errors import ConfigError

API_KEY_VARIABLE = "SLIME_API_KEY"
_KEY_BYTES = 32
# What an HTTP header carries unchanged.
_VALID = re.compile(r"[!-~]+")


def run_api_key() -> str | None:
    """The key of the run this process belongs to; None outside of a run."""
    return os.environ.get(API_KEY_VARIABLE) or None


def settled_api_key(config: Config) -> str:
    """The key a run uses: --sglang-api-key or --router-api-key, SLIME_API_KEY, or a new random one.

    Raises:
        ConfigError: the two flags differ, or the key cannot stand in an HTTP header.
    """
    engines, router = config.sglang_argv.get("api_key"), config.router_argv.get("api_key")
    if engines and router and engines != router:
        raise ConfigError(
            "--sglang-api-key and --router-api-key differ, but the router hands the caller's key on "
            "to the engines; give one of them, or better neither and set SLIME_API_KEY"
        )
    key = engines or router or run_api_key() or secrets.token_hex(_KEY_BYTES)
    if not _VALID.fullmatch(key):
        raise ConfigError(
            f"the API key ({len(key)} characters) may hold visible ASCII characters only: no spaces, "
            "line breaks or accents; for example the output of `openssl rand -hex 32`"
        )
    return key


@contextmanager
def with_run_api_key(config: Config) -> Generator[Config]:
    """`config` without any key, while SLIME_API_KEY holds it for every process that starts here.

    Raises:
        ConfigError: as `settled_api_key`.
    """
    before = os.environ.get(API_KEY_VARIABLE)
    os.environ[API_KEY_VARIABLE] = settled_api_key(config)
    try:
        yield replace(
            config,
            sglang_argv=_without_key(config.sglang_argv),
            router_argv=_without_key(config.router_argv),
        )
    finally:
        os.environ.pop(API_KEY_VARIABLE)
        if before is not None:
            os.environ[API_KEY_VARIABLE] = before


def _without_key(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "api_key"}
