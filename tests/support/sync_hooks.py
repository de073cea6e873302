"""A function for --custom-update-weight-post-write-path: notes what it was given, beside the versions."""

import json
import os
from pathlib import Path
from typing import Any


def note_version(args: Any, version_dir: str, rollout_engines: Any) -> None:
    """A line in a file of this process."""
    folder = Path(version_dir)
    row = {
        "version": folder.name,
        "files": sorted(path.name for path in folder.iterdir()),
        "engines": list(rollout_engines),
        "mode": args.update_weight_mode,
    }
    with (folder.parent / f"hook-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
