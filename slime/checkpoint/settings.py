"""Setting: what a Hugging Face config asks of one flag of Megatron, and what a flag's value means."""

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from slime.errors import ConfigError

Value = int | float | bool | str | None


@dataclass(frozen=True)
class Setting:
    """What a config asks of one flag of Megatron.

    Attributes:
        attribute: where Megatron's parser puts it.
        value: what has to stand there; None means that nothing has to.
        given: whether MODEL_ARGS need the flag; a switch that stays off does not appear.
        checked: whether another value is wrong; not so for how to train, which users may choose.
    """

    flag: str
    attribute: str
    value: Value
    given: bool = True
    checked: bool = True

    def words(self) -> list[str]:
        """The flag as it is typed, with its argument unless it is a switch."""
        if not self.given:
            return []
        return [self.flag] if isinstance(self.value, bool) else [self.flag, str(self.value)]

    def difference(self, megatron: Mapping[str, Any]) -> str | None:
        """What is wrong in Megatron's arguments, in words; None when they agree."""
        if self.value is None or not self.checked:
            return None
        found = effective_value(megatron, self.attribute)
        # A vocabulary that no flag gives is the config's.
        is_open = self.attribute == "vocab_size" and found is None
        if is_open or _agree(found, self.value):
            return None
        return f"{self.flag}: flags say {found}, config.json {self.value}"


def effective_value(megatron: Mapping[str, Any], attribute: str) -> Value:
    """The attribute as Megatron will use it: its validation fills some in from others."""
    rule = _EFFECTIVE.get(attribute)
    return megatron[attribute] if rule is None else rule(megatron)


def layer_pattern(layers: tuple[bool, ...]) -> str:
    """The words of --moe-layer-freq: (False, True, True) is `[0]*1+[1]*2`."""
    runs = ((kind, len(list(run))) for kind, run in groupby(layers))
    return "+".join(f"[{int(kind)}]*{length}" for kind, length in runs)


def _pattern_of(megatron: Mapping[str, Any]) -> str:
    """--moe-layer-freq in the form of `layer_pattern`, from each of the forms it may have.

    They are a number N (every N-th layer, from the first), an expression, and its value.
    """
    found = megatron["moe_layer_freq"]
    if isinstance(found, str):
        found = _read_pattern(found)
    if isinstance(found, int):
        if found < 1:
            raise ConfigError(f"--moe-layer-freq {found} must be at least 1, or a list of layers.")
        found = [i % found == 0 for i in range(megatron["num_layers"])]
    return layer_pattern(tuple(bool(kind) for kind in found))


def _read_pattern(words: str) -> Any:
    """The number or list that an expression such as `([1]*3+[0])*2` stands for."""

    def read(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.List(elts=items):
                return [read(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return read(left) + read(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return read(left) * read(right)
            case _:
                raise ValueError(f"no number, list, sum or product: {ast.dump(node)}")

    try:
        return read(ast.parse(words, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--moe-layer-freq {words!r} is no list of layers ({error}); write it like "
            "'[0]*3+[1]*58'."
        ) from None


def _query_groups(megatron: Mapping[str, Any]) -> Value:
    is_grouped = megatron["group_query_attention"]
    return megatron["num_query_groups" if is_grouped else "num_attention_heads"]


def _head_size(megatron: Mapping[str, Any]) -> Value:
    if megatron["kv_channels"] is not None:
        return megatron["kv_channels"]
    return megatron["hidden_size"] // megatron["num_attention_heads"]


def _uses_rope(megatron: Mapping[str, Any]) -> Value:
    given = megatron["use_rotary_position_embeddings"]
    return given or megatron["position_embedding_type"] == "rope"


def _or(attribute: str, default: Value) -> Callable[[Mapping[str, Any]], Value]:
    """`default` where nothing is given."""

    def rule(megatron: Mapping[str, Any]) -> Value:
        found = megatron[attribute]
        return default if found is None else found

    return rule


def _expert_width(megatron: Mapping[str, Any]) -> Value:
    found = megatron["moe_ffn_hidden_size"]
    return megatron["ffn_hidden_size"] if found is None else found


_EFFECTIVE: dict[str, Callable[[Mapping[str, Any]], Value]] = {
    "num_query_groups": _query_groups,
    "kv_channels": _head_size,
    "use_rotary_position_embeddings": _uses_rope,
    "num_experts": _or("num_experts", 0),
    "moe_layer_freq": _pattern_of,
    "moe_ffn_hidden_size": _expert_width,
    "moe_shared_expert_intermediate_size": _or("moe_shared_expert_intermediate_size", 0),
    "moe_router_topk_scaling_factor": _or("moe_router_topk_scaling_factor", 1.0),
    "moe_router_num_groups": _or("moe_router_num_groups", 0),
    "moe_router_group_topk": _or("moe_router_group_topk", 0),
    "q_lora_rank": _or("q_lora_rank", 0),
    # Of multi-latent attention alone is it asked for; there this is the default.
    "rope_type": _or("rope_type", "yarn"),
}


def _agree(found: Value, expected: Value) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected
