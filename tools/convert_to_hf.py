"""See `python tools/convert_to_hf.py --help`."""

import sys

from slime.cli.convert import run_to_hf

if __name__ == "__main__":
    sys.exit(run_to_hf(sys.argv[1:]))
