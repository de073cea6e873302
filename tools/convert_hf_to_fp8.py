"""See `python tools/convert_hf_to_fp8.py --help`."""

import sys

from slime.cli.convert import run_hf_to_fp8

if __name__ == "__main__":
    sys.exit(run_hf_to_fp8(sys.argv[1:]))
