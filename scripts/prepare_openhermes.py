"""Make SFT data of OpenHermes-2.5 as it is published, for scripts/run-qwen3-4B-base-sft.sh.

    python scripts/prepare_openhermes.py openhermes2_5.json openhermes.parquet

The input is the published file, one JSON array of well over a gigabyte that is read piece by piece, or its .jsonl or
.parquet form; the output, .jsonl or .parquet, has the column messages. Rows that cannot train are
left out and counted by reason.
"""

import argparse
import sys
from pathlib import Path

from slime.data.conversations import convert_conversations
from slime.errors import DataError


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help=".json, .jsonl or .parquet")
    parser.add_argument("target", type=Path, help=".jsonl or .parquet; must not be there yet")
    args = parser.parse_args()
    try:
        done = convert_conversations(args.source, args.target)
    except DataError as error:
        sys.stderr.write(f"prepare_openhermes: {error}\n")
        return 1
    lines = [f"{done.num_written:,} of {done.num_read:,} conversations in {args.target}, read back"]
    lines += [
        f"  {number:>9,} left out: {reason} (the first: {done.first[reason]})"
        for reason, number in done.dropped.items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
