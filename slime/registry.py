"""Everything that can be plugged in by name: name -> "module:attribute", imported on demand."""

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slime.errors import ConfigError
from slime.plugins import nearest


@dataclass(frozen=True)
class Table:
    """One kind of thing: what it is called in messages, and where each name leads.

    Attributes:
        group: of entry points, by which installed packages add names; None = they cannot.
    """

    title: str
    entries: dict[str, str]
    group: str | None = None

    def names(self) -> tuple[str, ...]:
        """The known names: as they are written below, then those of installed packages."""
        return tuple({**self.entries, **_installed(self.group)})

    def path(self, name: str) -> str:
        """The "module:attribute" that `name` leads to; a package cannot take a name below."""
        return self.entries.get(name) or _installed(self.group)[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in _installed(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


@functools.cache
def _installed(group: str | None) -> dict[str, str]:
    """Names that installed packages add to a table."""
    if group is None:
        return {}
    return {point.name: point.value for point in importlib.metadata.entry_points(group=group)}


def lookup(table: Table, name: str) -> Any:
    """The object called `name`, imported on first use.

    Raises:
        ConfigError: the table has no such name.
    """
    if name not in table:
        known = ", ".join(table.names())
        raise ConfigError(
            f"unknown {table.title} {name!r}{nearest(name, table.names())}; known: {known}"
        )
    module_name, _, attribute = table.path(name).partition(":")
    return getattr(importlib.import_module(module_name), attribute)


ALGORITHMS = Table(
    "advantage estimator",
    {
        "grpo": "slime.training.algorithms.grpo:GRPO",
        "gspo": "slime.training.algorithms.gspo:GSPO",
        "cispo": "slime.training.algorithms.cispo:CISPO",
        "reinforce_plus_plus": (
            "slime.training.algorithms.reinforce_plus_plus:REINFORCE_PLUS_PLUS"
        ),
        "reinforce_plus_plus_baseline": (
            "slime.training.algorithms.reinforce_plus_plus:REINFORCE_PLUS_PLUS_BASELINE"
        ),
    },
)

# Keyed by model_type in the Hugging Face config.json.
ARCHITECTURES = Table(
    "architecture",
    {
        "qwen2": "slime.checkpoint.architectures.qwen2:QWEN2",
        "qwen3": "slime.checkpoint.architectures.qwen3:QWEN3",
        "llama": "slime.checkpoint.architectures.llama:LLAMA",
        "qwen3_moe": "slime.checkpoint.architectures.qwen3_moe:QWEN3_MOE",
        "glm4": "slime.checkpoint.architectures.glm4:GLM4",
        "glm4_moe": "slime.checkpoint.architectures.glm4_moe:GLM4_MOE",
        "deepseek_v3": "slime.checkpoint.architectures.deepseek_v3:DEEPSEEK_V3",
        "olmo2": "slime.checkpoint.architectures.olmo2:OLMO2",
    },
    group="slime.architectures",
)

# Keyed by model_type too: (args, config, vp_stage) -> the layers, as --spec names them, of those
# architectures that `slime.backends.megatron.specs.block_spec` alone does not make.
LAYERS = Table(
    "layer spec",
    {
        "glm4": "slime_plugins.models.glm4:get_glm_spec",
        "olmo2": "slime_plugins.models.olmo2:get_olmo2_spec",
    },
    group="slime.layers",
)

# async (args, sample) -> float or dict; the names are those of --rm-type.
REWARDS = Table(
    "reward",
    {
        "math": "slime.rollout.rm_hub.math_utils:reward",
        "deepscaler": "slime.rollout.rm_hub.deepscaler:reward",
        "dapo": "slime.rollout.rm_hub.math_dapo_utils:reward",
        "f1": "slime.rollout.rm_hub.f1:reward",
        "exact_match": "slime.rollout.rm_hub.exact_match:reward",
        "random": "slime.rollout.rm_hub.random_reward:reward",
        "remote_rm": "slime.rollout.rm_hub.remote:reward",
        "gpqa": "slime.rollout.rm_hub.gpqa:reward",
        "ifeval": "slime.rollout.rm_hub.ifeval:reward",
        "ifbench": "slime.rollout.rm_hub.ifeval:reward",
        "code": "slime.rollout.rm_hub.code:reward",
        "judge": "slime.rollout.rm_hub.judge:reward",
        "reasoning_gym": "slime.rollout.rm_hub.gym_reward:reward",
    },
)

# (config, index, host, port, log_dir) -> the server to start.
ENGINES = Table(
    "engine",
    {
        "embedded": "slime.engines.embedded.launch:launch",
        "sglang": "slime.engines.sglang.launch:launch",
    },
)

TRANSPORTS = Table(
    "weight transport",
    {
        "gloo": "slime.weights.gloo:GlooTransport",
        "receiver": "slime.weights.receiver:ReceiverTransport",
        "local": "slime.weights.local:LocalTransport",
    },
)

TRACKERS = Table(
    "tracker",
    {
        "jsonl": "slime.observability.trackers:JsonlTracker",
        "tensorboard": "slime.observability.trackers:TensorBoardTracker",
    },
)

TABLES: tuple[Table, ...] = (
    ALGORITHMS,
    ARCHITECTURES,
    LAYERS,
    REWARDS,
    ENGINES,
    TRANSPORTS,
    TRACKERS,
)
