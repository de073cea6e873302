"""The signature of every function a user can name with a `--...-path` flag.

For type checkers and readers; slime finds the functions through `slime.plugins`, which checks at
start that they can be called like this. `args` is the flat namespace of all flags, with the facts
of the run (`engine_urls`, `sglang_router_ip`, ...) merged in.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slime.data.data_source import DataSource
from slime.data.sample import Sample
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, SampleGroup
from slime.rollout.filter_hub.base_types import DynamicFilterOutput

if TYPE_CHECKING:
    from torch import Tensor

Reward = float | dict[str, Any]

# --- generation ---


class RolloutFunction(Protocol):
    """--rollout-function-path, --eval-function-path: one round, or one evaluation; may be async."""

    def __call__(
        self, args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput | list[SampleGroup]: ...


class CustomGenerate(Protocol):
    """--custom-generate-function-path: answer one sample; a list is a fan-out of siblings.

    `sampling_params` are the same for all turns and hold no seed: each request gets one of its own on
    the way. Siblings share `rollout_id`. A fourth keyword `evaluation` is passed if it is declared. What is
    raised fails the sample.
    """

    async def __call__(
        self, args: Any, sample: Sample, sampling_params: dict[str, Any]
    ) -> Sample | list[Sample]: ...


class AgentFunction(Protocol):
    """--agent-function-path: run an agent against `session`; returns nothing, or the reward.

    `session` is a `slime.agent.Session`. It runs on the event loop: an agent that blocks goes into a
    thread, `await asyncio.to_thread(agent.run, ...)`. A third keyword `evaluation` is passed if it is
    declared. What is raised fails the sample.
    """

    async def __call__(self, session: Any, sample: Sample) -> Reward | None: ...


class SampleHook(Protocol):
    """--rollout-sample-hook-path: after generation, before the reward; may be async.

    A plain function runs on the event loop: keep it short. A returned Sample takes the place of the
    one given; what is raised fails the sample.
    """

    def __call__(
        self,
        args: Any,
        sample: Sample,
        *,
        rollout_id: int | None = None,
        evaluation: bool = False,
    ) -> Sample | Awaitable[Sample | None] | None: ...


class CustomReward(Protocol):
    """--custom-rm-path: the reward of one sample; what is raised fails the sample."""

    async def __call__(self, args: Any, sample: Sample) -> Reward: ...


class CustomGroupReward(Protocol):
    """--custom-rm-path with --group-rm: the rewards of a whole group, in order."""

    async def __call__(self, args: Any, samples: list[Sample]) -> list[Reward]: ...


class DynamicFilter(Protocol):
    """--dynamic-sampling-filter-path: keep or drop a finished group; sees its rewarded samples."""

    def __call__(
        self, args: Any, samples: list[Sample], **kwargs: Any
    ) -> DynamicFilterOutput | bool: ...


class BufferFilter(Protocol):
    """--buffer-filter-path: remove up to `num_samples` groups from `buffer` and return them."""

    def __call__(
        self, args: Any, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int
    ) -> list[list[Sample]]: ...


class RolloutSampleFilter(Protocol):
    """--rollout-sample-filter-path: set `remove_sample` on samples that shall not train."""

    def __call__(self, args: Any, data: Sequence[SampleGroup]) -> None: ...


class AllSamplesProcess(Protocol):
    """--rollout-all-samples-process-path: sees all finished groups, filtered ones too."""

    def __call__(
        self, args: Any, all_samples: Sequence[SampleGroup], data_source: DataSource
    ) -> None: ...


class RolloutLog(Protocol):
    """--custom-rollout-log-function-path: True = the metrics are logged, skip the default."""

    def __call__(
        self,
        rollout_id: int,
        args: Any,
        samples: list[Sample],
        extra_metrics: dict[str, Any],
        rollout_time: float,
    ) -> bool: ...


class EvalLog(Protocol):
    """--custom-eval-rollout-log-function-path: True = the metrics are logged, skip the default."""

    def __call__(
        self,
        rollout_id: int,
        args: Any,
        data: dict[str, dict[str, Any]],
        extra_metrics: dict[str, Any],
    ) -> bool: ...


# --- samples to training data ---


class RewardPostProcess(Protocol):
    """--custom-reward-post-process-path: (raw rewards, rewards to train with), one per sample."""

    def __call__(self, args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]: ...


class ConvertSamples(Protocol):
    """--custom-convert-samples-to-train-data-path: the columns of a round, one entry per sample."""

    def __call__(self, args: Any, samples: list[Sample]) -> dict[str, list[Any]]: ...


class RolloutDataPostprocess(Protocol):
    """--rollout-data-postprocess-path: on each train rank, after log-probs and advantages."""

    def __call__(self, args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None: ...


# --- training ---


class CustomLoss(Protocol):
    """--custom-loss-function-path: (loss, metrics) of a micro-batch."""

    def __call__(
        self,
        args: Any,
        batch: Mapping[str, Any],
        logits: "Tensor",
        sum_of_sample_mean: Callable[["Tensor"], "Tensor"],
    ) -> tuple["Tensor", dict[str, "Tensor"]]: ...


class CustomTis(Protocol):
    """--custom-tis-function-path: (corrected policy loss, masks, metrics)."""

    def __call__(
        self,
        *,
        args: Any,
        pg_loss: "Tensor",
        train_log_probs: list["Tensor"],
        rollout_log_probs: list["Tensor"],
        loss_masks: list["Tensor"],
        total_lengths: list[int],
        response_lengths: list[int],
    ) -> tuple["Tensor", list["Tensor"], dict[str, "Tensor"]]: ...


class PgLossReducer(Protocol):
    """--custom-pg-loss-reducer-function-path: a function from per-token losses to a scalar."""

    def __call__(
        self,
        total_lengths: list[int],
        response_lengths: list[int],
        loss_masks: list["Tensor"],
        calculate_per_token_loss: bool,
    ) -> Callable[["Tensor"], "Tensor"]: ...


class CustomAdvantage(Protocol):
    """--custom-advantage-function-path: fill `advantages` and `returns` in place."""

    def __call__(self, args: Any, rollout_data: dict[str, Any]) -> None: ...


class ModelProvider(Protocol):
    """--custom-model-provider-path: the module of one pipeline stage; may take `vp_stage`."""

    def __call__(self, pre_process: bool, post_process: bool) -> Any: ...


class MegatronInit(Protocol):
    """--custom-megatron-init-path: after Megatron has been initialised."""

    def __call__(self, args: Any) -> None: ...


class BeforeLogProb(Protocol):
    """--custom-megatron-before-log-prob-hook-path: before each log-prob pass."""

    def __call__(self, args: Any, model: Any, store_prefix: str) -> None: ...


class BeforeTrainStep(Protocol):
    """--custom-megatron-before-train-step-hook-path: before each optimizer step."""

    def __call__(
        self,
        args: Any,
        rollout_id: int,
        step_id: int,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
    ) -> None: ...


class UpdateWeightPostWrite(Protocol):
    """--custom-update-weight-post-write-path: on every trainer rank, once weights are on disk."""

    def __call__(self, args: Any, version_dir: str, rollout_engines: Any) -> None: ...
