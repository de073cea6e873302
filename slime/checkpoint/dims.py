"""ModelDims: the sizes that give every parameter its shape, in Megatron and on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

from slime.errors import CheckpointError

Axis = Literal[
    "hidden",
    "ffn",
    "gate_up",
    "head_dim",
    "query_size",
    "key_value_size",
    "vocab_size",
    "num_experts",
    "moe_ffn",
    "shared_ffn",
    "q_lora_rank",
    "kv_lora_rank",
    "mla_query_size",
    "mla_kv_down_size",
    "mla_kv_up_size",
    "mla_output_size",
]

# What only some models of a family have; a row of a table may ask for one of them.
Feature = Literal["qkv_bias", "qk_norm", "shared_experts", "q_lora", "no_q_lora"]

# transformers keeps the first of these for Qwen3, the second for GLM and DeepSeek, and may write
# the third for either.
_EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
_WITH_EXPERTS = ("qwen3_moe", "glm4_moe", "deepseek_v3")


@dataclass(frozen=True, kw_only=True)
class MoEDims:
    """Sizes of the mixture-of-experts layers.

    Attributes:
        ffn: width of one of gate and up of one expert, HF's `moe_intermediate_size`.
        shared_ffn: the same of the shared experts, which are one wide MLP; 0 without them.
        layers: for each layer whether it has experts; the others have an ordinary MLP.
    """

    num_experts: int
    ffn: int
    shared_ffn: int
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class MLADims:
    """Sizes of multi-latent attention, named as Megatron names them.

    Attributes:
        q_lora_rank: None when queries are projected directly.
        qk_head_dim: the part of a query or key head without position, HF's `qk_nope_head_dim`.
        qk_pos_emb_head_dim: the part that RoPE turns, HF's `qk_rope_head_dim`.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes of one model.

    Attributes:
        head_dim: of a query, key or value head; with `mla`, whose heads differ, its `qk_head_dim`.
        ffn: width of one of gate and up, i.e. HF's `intermediate_size`.
        num_query_groups: key/value heads.
        vocab_size: rows of the embedding on disk.
        padded_vocab_size: rows in Megatron; at least `vocab_size`, and a multiple of the
            tensor-parallel size.
        tied: the output layer is the embedding.
        qkv_bias, qk_norm: query, key and value have a bias; query and key heads are normalised.
        num_mtp_layers: layers for multi-token prediction, which lie on disk after the others.
        moe: None for a dense model.
        mla: None for ordinary attention.
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
    qkv_bias: bool = False
    qk_norm: bool = False
    num_mtp_layers: int = 0
    moe: MoEDims | None = None
    mla: MLADims | None = None

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], *, padded_vocab_size: int | None = None
    ) -> Self:
        """The sizes a `config.json` states; the vocabulary is padded only when asked to.

        Raises:
            CheckpointError: a key is missing, or a size is impossible.
        """
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        num_layers, vocab_size = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
        mla = _mla_dims(config)
        dims = cls(
            num_layers=num_layers,
            num_heads=heads,
            # Old Llama files have neither key/value heads (one per head) nor a head size.
            num_query_groups=config.get("num_key_value_heads") or heads,
            # Of MLA transformers writes the part with RoPE as head_dim, the published files none.
            head_dim=mla.qk_head_dim if mla else config.get("head_dim") or hidden // heads,
            hidden=hidden,
            ffn=_size(config, "intermediate_size"),
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=_has_qkv_bias(config),
            qk_norm=_has_qk_norm(config),
            num_mtp_layers=_count(config, "num_nextn_predict_layers", 0),
            moe=_moe_dims(config, num_layers),
            mla=mla,
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

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` of the whole model has experts."""
        return self.moe is not None and self.moe.layers[index]

    def has(self, feature: Feature) -> bool:
        """Whether the model has what a row of a table may ask for."""
        match feature:
            case "qkv_bias":
                return self.qkv_bias
            case "qk_norm":
                return self.qk_norm
            case "shared_experts":
                return self.moe is not None and self.moe.shared_ffn > 0
            case "q_lora":
                return self.mla is not None and self.mla.q_lora_rank is not None
            case "no_q_lora":
                return self.mla is not None and self.mla.q_lora_rank is None

    def axes(self, names: tuple[Axis, ...]) -> tuple[int, ...]:
        """The shape with these axes: `axes(("hidden", "ffn"))` = `(hidden, ffn)`.

        Raises:
            CheckpointError: the model has no such axis, e.g. no experts.
        """
        sizes = self._sizes()
        for name in names:
            if not sizes.get(name):
                raise CheckpointError(
                    f"config.json gives no {name}, which a model of this architecture has; is it "
                    "cut short, or of another model_type?"
                )
        return tuple(sizes[name] for name in names)

    def _sizes(self) -> dict[Axis, int]:
        sizes: dict[Axis, int] = {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "gate_up": 2 * self.ffn,
            "head_dim": self.head_dim,
            "query_size": self.query_size,
            "key_value_size": self.key_value_size,
            "vocab_size": self.vocab_size,
        }
        if (moe := self.moe) is not None:
            sizes |= {
                "num_experts": moe.num_experts,
                "moe_ffn": moe.ffn,
                "shared_ffn": moe.shared_ffn,
            }
        if (mla := self.mla) is not None:
            sizes |= {
                "q_lora_rank": mla.q_lora_rank or 0,
                "kv_lora_rank": mla.kv_lora_rank,
                "mla_query_size": self.num_heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim),
                "mla_kv_down_size": mla.kv_lora_rank + mla.qk_pos_emb_head_dim,
                "mla_kv_up_size": self.num_heads * (mla.qk_head_dim + mla.v_head_dim),
                "mla_output_size": self.num_heads * mla.v_head_dim,
            }
        return sizes


def _has_qkv_bias(config: Mapping[str, Any]) -> bool:
    """As transformers has it: Qwen2 always, GLM-4 unless the file says no."""
    model_type = config.get("model_type")
    return model_type == "qwen2" or bool(config.get("attention_bias", model_type == "glm4"))


def _has_qk_norm(config: Mapping[str, Any]) -> bool:
    """Always in Qwen3; in GLM-4.5 the file says so."""
    is_qwen3 = config.get("model_type") in ("qwen3", "qwen3_moe")
    return is_qwen3 or bool(config.get("use_qk_norm", False))


def _moe_dims(config: Mapping[str, Any], num_layers: int) -> MoEDims | None:
    if config.get("model_type") not in _WITH_EXPERTS:
        return None
    key = next((key for key in _EXPERT_KEYS if config.get(key)), _EXPERT_KEYS[0])
    ffn = _size(config, "moe_intermediate_size")
    return MoEDims(
        num_experts=_size(config, key),
        ffn=ffn,
        shared_ffn=ffn * _count(config, "n_shared_experts", 0),
        layers=_moe_layers(config, num_layers),
    )


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if config.get("model_type") == "qwen3_moe":
        step = _count(config, "decoder_sparse_step", 1) or 1
        dense = cast("list[int]", config.get("mlp_only_layers") or [])
        return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    first = _count(config, "first_k_dense_replace", None)
    return tuple(i >= first for i in range(num_layers))


def _mla_dims(config: Mapping[str, Any]) -> MLADims | None:
    if config.get("model_type") != "deepseek_v3":
        return None
    return MLADims(
        q_lora_rank=_size(config, "q_lora_rank") if config.get("q_lora_rank") else None,
        kv_lora_rank=_size(config, "kv_lora_rank"),
        qk_head_dim=_size(config, "qk_nope_head_dim"),
        qk_pos_emb_head_dim=_size(config, "qk_rope_head_dim"),
        v_head_dim=_size(config, "v_head_dim"),
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json needs a positive number as {key}; it has {value!r}.")
    return value


def _count(config: Mapping[str, Any], key: str, default: int | None) -> int:
    """A number that may be 0; a key that is missing or null is `default`, when there is one."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"config.json needs a number from 0 up as {key}; it has {value!r}.")
    return value
