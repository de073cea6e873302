"""Door to `slime.data.chat`."""

from slime.data.chat import load_tokenizer

__all__ = ["load_tokenizer"]
