"""run_driver: argv into a training loop, errors into one message and an exit code."""

import sys
import traceback
from collections.abc import Callable, Sequence

from slime.cli.failures import failure_text, note_in_logs
from slime.cli.parse import load_config
from slime.config.api_key import with_run_api_key
from slime.config.config import Config
from slime.errors import ConfigError, SlimeError
from slime.observability.logging import setup_logging

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run_driver(loop: Callable[[Config], None], argv: Sequence[str]) -> int:
    """Run `loop` with the configuration in `argv`; the process's exit code.

    Whatever goes wrong ends as one message. The traceback is in the run folder's logs; of an error
    that is none of slime's own (a bug, often in a function of the user) the last frames are shown.
    """
    setup_logging()
    try:
        with with_run_api_key(load_config(argv)) as config:
            loop(config)
    except ConfigError as error:
        note_in_logs(error)
        return _end(EXIT_USAGE, str(error))
    except SlimeError as error:
        note_in_logs(error)
        return _end(EXIT_FAILED, failure_text(error))
    except KeyboardInterrupt:
        return _end(
            EXIT_INTERRUPTED,
            "interrupted; the last checkpoint is whole, start again with --load to go on",
        )
    except Exception as error:  # noqa: BLE001 - the last fence: what nobody foresaw
        if not note_in_logs(error):
            traceback.print_exception(error, file=sys.stderr)
        return _end(EXIT_FAILED, failure_text(error))
    return 0


def _end(code: int, message: str) -> int:
    sys.stderr.write(f"\nslime: {message}\n")
    return code
