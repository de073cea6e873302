"""`slime model-args HF_DIR`: the flags of Megatron that a `config.json` asks for, as a bash array."""

import shlex
import sys
from pathlib import Path

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.config.checkpoints import read_hf_config
from slime.errors import CheckpointError, ConfigError

EXIT_FAILED = 1
EXIT_USAGE = 2
_USAGE = """\
usage: slime model-args HF_DIR    (a folder with a config.json)

Prints MODEL_ARGS as the files in scripts/models have them:

    source <(slime model-args HF_DIR)
    python3 train.py "${MODEL_ARGS[@]}" ...
"""


def show_model_args(argv: list[str]) -> int:
    """Print the flags of a model; 0, 1 for a model that has none, 2 for other words."""
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stderr.write(_USAGE)
        return EXIT_USAGE
    try:
        words = megatron_flags_from_hf(read_hf_config(argv[0]))
    except (ConfigError, CheckpointError) as error:
        sys.stderr.write(f"slime model-args: {error}\n")
        return EXIT_FAILED
    sys.stdout.write(as_bash_array(words, Path(argv[0]).resolve().name))
    return 0


def as_bash_array(words: list[str], name: str) -> str:
    """`MODEL_ARGS=(...)`, a line for each flag with its value.

    Args:
        words: flags and values, as a command line has them.
        name: of the model, for the comment above.
    """
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join(
        [
            f'# Model flags of {name}; source this file and pass "${{MODEL_ARGS[@]}}".',
            "# shellcheck shell=bash disable=SC2034",
            "MODEL_ARGS=(",
            *lines,
            ")",
            "",
        ]
    )
