"""run_driver: argv into a training loop, errors into one message and an exit code."""

import logging
import sys
from collections.abc import Callable, Sequence

from slime.cli.parse import load_config
from slime.config.config import Config
from slime.errors import ConfigError, SlimeError
from slime.observability.logging import setup_logging

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run_driver(loop: Callable[[Config], None], argv: Sequence[str]) -> int:
    """Run `loop` with the configuration in `argv`; the process's exit code.

    Errors that slime raises on purpose end as one message, without a traceback (which the run
    folder's logs have).
    """
    setup_logging()
    try:
        loop(load_config(argv))
    except ConfigError as error:
        sys.stderr.write(f"\nslime: {error}\n")
        return EXIT_USAGE
    except SlimeError as error:
        logger.debug("the run failed", exc_info=True)
        sys.stderr.write(f"\nslime: {type(error).__name__}: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nslime: interrupted; the last checkpoint is whole, start again with --load to go on\n"
        )
        return EXIT_INTERRUPTED
    return 0
