"""A process for the doctor: registers as told on the command line, waits, prints `ready`.

`python patient.py RUN_DIR ROLE`, with `--silent` not to register.
"""

import sys
import time
from pathlib import Path

from slime.observability import waits
from slime.observability.doctor import register_process


def wait_for_ever() -> None:
    with waits.waiting("train rank 1", "join", warn_after_s=0.05):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            time.sleep(0.1)


if __name__ == "__main__":
    waits.TICK_S = 0.05
    if "--silent" not in sys.argv:
        register_process(sys.argv[2], Path(sys.argv[1]))
    wait_for_ever()
