"""ModelDims: the sizes that give every parameter its shape, in Megatron and on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from slime.errors import CheckpointError

Axis = Literal["hidden", "ffn", "head_dim", "query_size", "key_value_size", "vocab_size"]


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes of one model.

    Attributes:
        ffn: width of one of gate and up, i.e. HF's `intermediate_size`.
        num_query_groups: key/value heads.
        vocab_size: rows of the embedding on disk.
        padded_vocab_size: rows in Megatron; at least `vocab_size`, and a multiple of the
            tensor-parallel size.
        tied: the output layer is the embedding.
    """

    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    hidden: int
    ffn: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], *, padded_vocab_size: int | None = None
    ) -> Self:
        """The sizes a `config.json` states; the vocabulary is padded only when asked to.

        Raises:
            CheckpointError: a key is missing, or a size is impossible.
        """
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        vocab_size = _size(config, "vocab_size")
        dims = cls(
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            # Old Llama files have neither key/value heads (one per head) nor a head size.
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            hidden=hidden,
            ffn=_size(config, "intermediate_size"),
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
            tied=bool(config.get("tie_word_embeddings", False)),
        )
        if dims.num_heads % dims.num_query_groups:
            raise CheckpointError(
                f"config.json has num_attention_heads={dims.num_heads}, which is no multiple of "
                f"num_key_value_heads={dims.num_query_groups}."
            )
        return dims if padded_vocab_size is None else dims.with_padded_vocab(padded_vocab_size)

    def with_padded_vocab(self, padded_vocab_size: int) -> Self:
        """The same model with `padded_vocab_size` rows in Megatron's embedding.

        Raises:
            CheckpointError: fewer rows than the vocabulary has.
        """
        if padded_vocab_size < self.vocab_size:
            raise CheckpointError(
                f"A padded vocabulary of {padded_vocab_size} cannot hold the checkpoint's "
                f"{self.vocab_size} tokens; leave --padded-vocab-size out or raise it."
            )
        return replace(self, padded_vocab_size=padded_vocab_size)

    @property
    def query_size(self) -> int:
        """Width of all query heads together; also of the attention's output before `o_proj`."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; that of the value heads too."""
        return self.num_query_groups * self.head_dim

    def axes(self, names: tuple[Axis, ...]) -> tuple[int, ...]:
        """The shape with these axes: `axes(("hidden", "ffn"))` = `(hidden, ffn)`."""
        sizes: dict[Axis, int] = {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "head_dim": self.head_dim,
            "query_size": self.query_size,
            "key_value_size": self.key_value_size,
            "vocab_size": self.vocab_size,
        }
        return tuple(sizes[name] for name in names)


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json needs a positive number as {key}; it has {value!r}.")
    return value
