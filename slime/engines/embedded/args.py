"""ServerArgs: the embedded server's command line; names as in SGLang where it has the option."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from slime.config.api_key import API_KEY_VARIABLE, run_api_key

DTYPES = ("float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Options of one embedded engine."""

    model_path: str
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    served_model_name: str | None = None
    trust_remote_code: bool = False
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: str = "float32"
    attention_backend: str = "auto"
    context_length: int | None = None
    max_running_requests: int = 128
    max_prefill_tokens: int = 4096
    mem_fraction_static: float = 0.3
    disable_radix_cache: bool = False
    enable_deterministic_inference: bool = False
    random_seed: int = 0
    weight_version: str = "default"
    api_key: str | None = None
    num_threads: int = 1
    log_level: str = "info"

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model_path

    @property
    def max_kv_bytes(self) -> int | None:
        """Most memory for keys and values: a share of what is available now."""
        available = _available_bytes()
        return None if available is None else int(available * self.mem_fraction_static)

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Names of all options, with underscores."""
        return frozenset(field.name for field in fields(cls))


def parse_args(argv: Sequence[str] | None = None) -> ServerArgs:
    """The options on a command line; stops the process with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m slime.engines.embedded.server",
        description="Rollout engine on CPU that speaks SGLang's HTTP protocol.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="Folder with a Hugging Face causal LM.")
    add("--tokenizer-path", help="Folder with the tokenizer; the model's by default.")
    add("--skip-tokenizer-init", action="store_true", help="No text: ids in, ids out.")
    add("--served-model-name", help="Name in /v1/models; the model path by default.")
    add("--trust-remote-code", action="store_true", help="Run model code from the folder.")
    add("--host", default=ServerArgs.host)
    add("--port", type=int, default=ServerArgs.port)
    add(
        "--dtype",
        choices=DTYPES,
        default=ServerArgs.dtype,
        help="float32 keeps log-probs within 1e-5 of the trainer's; bfloat16 moves them by 0.1.",
    )
    add(
        "--attention-backend",
        default=ServerArgs.attention_backend,
        choices=("auto", "fused", "slots", "sdpa", "eager"),
        help="auto: the fastest that passes the check.",
    )
    add("--context-length", type=int, help="Most tokens of prompt and answer together.")
    add("--max-running-requests", type=int, default=ServerArgs.max_running_requests)
    add(
        "--max-prefill-tokens",
        type=int,
        default=ServerArgs.max_prefill_tokens,
        help="Prompt tokens, padding included, of one prefill pass.",
    )
    add(
        "--mem-fraction-static",
        type=float,
        default=ServerArgs.mem_fraction_static,
        help="Share of the free memory that keys and values may take.",
    )
    add(
        "--disable-radix-cache",
        action="store_true",
        help="Read every prompt by itself, also when another request with the same one runs.",
    )
    add(
        "--enable-deterministic-inference",
        action="store_true",
        help="Only batch shapes in which a row's bits do not depend on the other rows.",
    )
    add(
        "--random-seed",
        type=int,
        default=ServerArgs.random_seed,
        help="For requests that bring no seed of their own.",
    )
    add("--weight-version", default=ServerArgs.weight_version)
    add(
        "--api-key",
        default=run_api_key(),
        help="Refuse callers that do not send it as a bearer token. Better set it as "
        f"{API_KEY_VARIABLE}: any user can read a command line.",
    )
    add(
        "--num-threads",
        type=int,
        default=ServerArgs.num_threads,
        help="Threads of torch; more than one is slower unless the cores are idle.",
    )
    add("--log-level", choices=LOG_LEVELS, default=ServerArgs.log_level)
    return ServerArgs(**vars(parser.parse_args(argv)))


def _available_bytes() -> int | None:
    """Memory the kernel could hand out now; None where there is no /proc."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
