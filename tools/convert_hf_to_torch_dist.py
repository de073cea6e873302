"""See `python tools/convert_hf_to_torch_dist.py --help`."""

import sys

from slime.cli.convert import run_hf_to_torch_dist

if __name__ == "__main__":
    sys.exit(run_hf_to_torch_dist(sys.argv[1:]))
