"""Config: every setting of a run, frozen; sections are its base classes."""

import argparse
import functools
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from slime.config.agent import AgentConfig
from slime.config.algo import AlgoConfig
from slime.config.cluster import ClusterConfig
from slime.config.data import DataConfig
from slime.config.debug import DebugConfig
from slime.config.environments import EnvironmentsConfig
from slime.config.evaluation import EvalConfig
from slime.config.fields import Option, options_of
from slime.config.foreign import megatron_values, prefixed_values
from slime.config.megatron import MegatronConfig
from slime.config.observability import ObservabilityConfig
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig
from slime.config.sandbox import SandboxConfig
from slime.config.train import TrainConfig
from slime.config.weights import WeightsConfig

SECTIONS: tuple[type[Any], ...] = (
    ClusterConfig,
    TrainConfig,
    RolloutConfig,
    AgentConfig,
    EnvironmentsConfig,
    DataConfig,
    EvalConfig,
    AlgoConfig,
    WeightsConfig,
    RewardConfig,
    SandboxConfig,
    ObservabilityConfig,
    DebugConfig,
    MegatronConfig,
)

# Names of secrets, in any case: judge_api_key, WANDB_API_KEY, HF_TOKEN, but not reward_key.
_SECRET_NAME = re.compile(
    r"api_?keys?$|(access|private|wandb)_key$|(^|(hf|auth|access|api|bearer)_)token$"
    r"|passw|secret|credential",
    re.IGNORECASE,
)
_REDACTED = "***"


@dataclass(frozen=True, kw_only=True)
class Config(
    ClusterConfig,
    TrainConfig,
    RolloutConfig,
    AgentConfig,
    EnvironmentsConfig,
    DataConfig,
    EvalConfig,
    AlgoConfig,
    WeightsConfig,
    RewardConfig,
    SandboxConfig,
    ObservabilityConfig,
    DebugConfig,
    MegatronConfig,
):
    """All sections in one; a function that asks for a section accepts it.

    Attributes:
        megatron_argv: words for Megatron's own parser; after `resolve` they include MegatronConfig.
        sglang_argv: SGLang server options without their prefix, only those given.
        router_argv: router options without their prefix, only those given; after `resolve` with the
            policy of a router that slime starts.
        custom: keys of --custom-config-path that no flag owns; plugins find them in the namespace.
    """

    megatron_argv: tuple[str, ...] = ()
    sglang_argv: dict[str, Any] = field(default_factory=dict[str, Any])
    router_argv: dict[str, Any] = field(default_factory=dict[str, Any])
    custom: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_namespace(self, **facts: Any) -> argparse.Namespace:
        """The flat `args` plugins know: all sections, Megatron's values, `sglang_*`, `router_*`.

        Tuples become lists, as argparse would have made them.

        Args:
            facts: what was learnt at run time; goes over everything else.
        """
        values = megatron_values(self.megatron_argv)
        values |= prefixed_values("sglang", self.sglang_argv)
        values |= prefixed_values("router", self.router_argv)
        values |= {item.name: _mutable(getattr(self, item.name)) for item in fields(self)}
        values["rollout_global_dataset"] = self.rollout_global_dataset
        return argparse.Namespace(**(values | self.custom | facts))

    def to_json(self) -> str:
        """The whole configuration as indented JSON with sorted keys; secrets show as "***"."""
        return json.dumps(without_secrets(asdict(self)), indent=2, sort_keys=True, default=str)


def without_secrets(value: Any, name: str = "") -> Any:
    """`value` with "***" in place of what stands under the name of a key, token or password."""
    if value and not isinstance(value, bool) and _SECRET_NAME.search(name):
        return _REDACTED
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {key: without_secrets(item, str(key)) for key, item in items}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in cast(list[Any], value)]
    return value


@functools.cache
def slime_options() -> tuple[Option, ...]:
    """Every flag of slime's own and those of Megatron it reads, section by section."""
    return tuple(option for section in SECTIONS for option in options_of(section))


def _mutable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(cast(tuple[Any, ...], value))
    return value
