"""The embedded engine as a process: `python -m slime.engines.embedded.server --model-path DIR`."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.engines.embedded.args import ServerArgs, parse_args
from slime.errors import EngineError
from slime.observability.doctor import register_from_environment
from slime.observability.garbage import settle_memory

logger = logging.getLogger(__name__)

# How long answers may take to leave after SIGTERM; requests have been ended by then.
_SHUTDOWN_S = 2.0
# The engine thread gives the interpreter back often: HTTP answers need it between two kernels.
_SWITCH_INTERVAL_S = 0.001


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of a server that ran until SIGTERM or SIGINT."""
    args = parse_args(argv)
    _set_up_logging(args.log_level)
    register_from_environment(address=f"http://{args.host}:{args.port}")
    started = time.monotonic()
    try:
        app = make_app(args)
    except EngineError as error:
        logger.error("%s", error)
        return 1
    from aiohttp import web

    settle_memory()
    seconds = time.monotonic() - started
    logger.info("loaded in %.1f s; serving at http://%s:%d", seconds, args.host, args.port)
    try:
        web.run_app(
            app.build(), host=args.host, port=args.port, print=None, access_log=None,
            handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S,
        )  # fmt: skip
    except OSError as error:
        logger.error("cannot listen at %s:%d: %s", args.host, args.port, error)
        return 1
    # A thread that is still alive waits in a collective whose other side is gone.
    return 1 if app.loop.failure is not None or app.loop.is_alive else 0


def make_app(args: ServerArgs) -> Any:
    """An EngineApp with its model loaded and checked.

    Raises:
        EngineError: the model cannot be loaded, or does not pass the self-check.
    """
    if not (Path(args.model_path) / "config.json").is_file():
        raise EngineError(
            f"--model-path {args.model_path}: no config.json there; give a folder with a Hugging "
            "Face model"
        )
    import torch

    from slime.engines.embedded.answers import RequestMaker
    from slime.engines.embedded.app import EngineApp
    from slime.engines.embedded.model import load_model, stop_token_ids
    from slime.engines.embedded.scheduler import Scheduler, SchedulerLimits
    from slime.engines.embedded.selfcheck import check_model

    _quieten_transformers()
    torch.set_num_threads(args.num_threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model_path, dtype=dtype, trust_remote_code=args.trust_remote_code)
    tokenizer = _load_tokenizer(args)
    checked = check_model(
        model,
        max_running=args.max_running_requests,
        attention=args.attention_backend,
        context_length=args.context_length,
        deterministic=args.enable_deterministic_inference,
    )
    limits = SchedulerLimits(
        max_running=args.max_running_requests,
        prefill_tokens=args.max_prefill_tokens,
        max_kv_bytes=args.max_kv_bytes,
        share_prompts=not args.disable_radix_cache,
    )
    scheduler = Scheduler(checked.runner, limits, checked.shapes)
    scheduler.weight_version = args.weight_version
    maker = RequestMaker(
        vocab_size=checked.runner.vocab_size,
        context_length=checked.runner.context_length,
        eos_ids=stop_token_ids(model, tokenizer),
        detokenizer=_detokenizer(tokenizer),
        random_seed=args.random_seed,
    )
    return EngineApp(args, checked, maker, scheduler)


def _load_tokenizer(args: ServerArgs) -> Any:
    import transformers

    if args.skip_tokenizer_init:
        return None
    path = args.tokenizer_path or args.model_path
    try:
        load: Any = transformers.AutoTokenizer
        return load.from_pretrained(
            path, local_files_only=True, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(
            f"no tokenizer in {path} ({error}); give --tokenizer-path, or --skip-tokenizer-init "
            "when requests and answers are token ids only"
        ) from error


def _detokenizer(tokenizer: Any) -> Any:
    from slime.engines.embedded.detokenize import Detokenizer

    return None if tokenizer is None else Detokenizer(tokenizer)


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )  # fmt: skip
    logging.getLogger("aiohttp.server").addFilter(_is_no_http2_probe)


def _quieten_transformers() -> None:
    """Neither progress bars nor advice in the log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _is_no_http2_probe(record: logging.LogRecord) -> bool:
    """False for the tracebacks of routers that try HTTP/2 (gRPC) on this port before HTTP/1."""
    error = record.exc_info[1] if record.exc_info else None
    return not (error is not None and "PRI" in f"{error}")


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Nothing is left to save, and taking torch apart would cost seconds on a busy machine.
    os._exit(code)
