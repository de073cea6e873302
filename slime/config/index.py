"""Every flag of the command line, each with its owner."""

import functools

from slime.config.config import slime_options
from slime.config.fields import Option
from slime.config.recorded import load_table
from slime.config.words import OptionIndex

# Launch scripts give these; a stock Megatron has no such options.
_PATCHED = ("--post-self-attn-layernorm", "--post-mlp-layernorm", "--use-gated-attention")


@functools.cache
def command_line_index() -> OptionIndex:
    """All spellings; where slime and another know the same one, it is slime's."""
    return OptionIndex(
        [
            *slime_options(),
            *load_table("megatron").options,
            *patched_megatron_options(),
            *load_table("sglang").options,
            *load_table("router").options,
        ]
    )


def patched_megatron_options() -> list[Option]:
    """Switches that exist only in a patched Megatron, known so that their state can be told."""
    return [
        Option(
            names=(name,),
            dest=name.removeprefix("--").replace("-", "_"),
            owner="megatron",
            group="patched Megatron",
            help="Only in a patched Megatron.",
            kind="true",
            type_name="bool",
            default=False,
        )
        for name in _PATCHED
    ]
