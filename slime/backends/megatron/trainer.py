"""MegatronTrainer: one rank of one model, trained by stock Megatron-Core."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

from megatron.training.global_vars import set_args
from torch import Tensor

from slime.backends.megatron.model import bare_model, build_model, find_architecture
from slime.backends.megatron.optimizer.distributed import (
    build_optimizer,
    build_scheduler,
    guarded_step,
    reset_moments,
    zero_gradients,
)
from slime.backends.megatron.optimizer.offload import DeviceMemory
from slime.backends.megatron.passes.critic import HEAD_NAME
from slime.backends.megatron.passes.forward import LogProbOptions
from slime.backends.megatron.passes.micro_batches import Passes, sum_gradients
from slime.backends.megatron.passes.routing_replay import RoutingReplay
from slime.backends.megatron.passes.views import add_up
from slime.backends.megatron.process.arguments import parse_megatron_args, refuse_unbuilt
from slime.backends.megatron.process.initialize import (
    choose_device,
    join_process_group,
    keep_freed_memory,
    seed_everything,
)
from slime.backends.megatron.process.parallel import build_groups, dp_group
from slime.backends.megatron.process.stock import without_warnings
from slime.backends.megatron.state.checkpoint import (
    TrainState,
    load_model_weights,
    load_train_state,
    save_checkpoint,
)
from slime.backends.megatron.state.named_weights import load_hf, named_weights, save_hf
from slime.backends.megatron.state.sources import (
    Source,
    find_source,
    reference_source,
    resolve_start,
)
from slime.backends.megatron.state.weight_copies import WeightCopies
from slime.config.config import Config
from slime.data.batch import RolloutBatch
from slime.errors import CheckpointError, ConfigError
from slime.plugins import load_function
from slime.training.interface import LossFn, Metrics, ModelTag, TrainStep
from slime.training.update import needs_reference

logger = logging.getLogger(__name__)

# The prefix under which a hook may store what a log-prob pass with these weights gives.
_STORE_PREFIX = {
    ModelTag.ACTOR: "",
    ModelTag.OLD_ACTOR: "",
    ModelTag.REF: "ref_",
    ModelTag.TEACHER: "teacher_",
}


class MegatronTrainer:
    """See `slime.training.interface.Trainer`, which this implements.

    Args:
        config: the run's configuration; its `megatron_argv` goes to Megatron's own parser.
        rank, world_size: of this process among all training ranks.
        local_rank: among those of its node; picks the GPU.
        master_addr, master_port: where rank 0 opens the store of the process group.
        role: a critic gives values, and is trained by a loss of them; it knows neither log-probs
            nor the other copies of weights, and is no Hugging Face folder.

    Raises:
        ConfigError: flags that cannot work, or that do not describe the model in --hf-checkpoint.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        master_addr: str,
        master_port: int,
        role: Literal["actor", "critic"] = "actor",
    ) -> None:
        refuse_unbuilt(config)
        self._config = config
        self._is_critic = role == "critic"
        self._device = choose_device(config, local_rank)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._args = parse_megatron_args(
            config, device=self._device, rank=rank, world_size=world_size
        )
        self._architecture = find_architecture(config, self._args)
        set_args(self._args)  # a model provider is called without them
        if self._is_critic:  # its output layer is no embedding
            self._args.untie_embeddings_and_output_weights = True
        join_process_group(
            config,
            device=self._device,
            rank=rank,
            world_size=world_size,
            master_addr=master_addr,
            master_port=master_port,
        )
        self.layout = build_groups(self._args)
        seed_everything(config.seed, self.layout)
        facts = {k: v for k, v in vars(self._args).items() if k not in vars(config)}
        self._plugin_args = config.to_namespace(**facts)
        _call_hook(config.custom_megatron_init_path, self._plugin_args)
        self._build()

    @without_warnings()
    def _build(self) -> None:
        self._model = build_model(
            self._args,
            self._config,
            architecture=self._architecture,
            device=self._device,
            is_critic=self._is_critic,
        )
        self._bare = [bare_model(chunk) for chunk in self._model]
        self._optimizer = build_optimizer(self._args, self._model)
        self._scheduler = build_scheduler(self._args, self._config, self._optimizer)
        self._copies = WeightCopies(self._bare)
        self._memory = DeviceMemory(self._model, self._optimizer)
        options = LogProbOptions(
            temperature=self._config.rollout_temperature,
            chunk_size=self._config.log_probs_chunk_size,
            vocab_size=self._architecture.dims.vocab_size,
        )
        self._passes = Passes(
            self._model,
            options,
            device=self._device,
            pad_multiple=self._pad_multiple(),
            is_critic=self._is_critic,
            keeps_all_rows=self._config.loss_type == "custom_loss" and not self._is_critic,
            has_varlen=self._args.bf16,
            replay=self._routing_replay(),
        )
        transformer: Any = self._model[0].config
        transformer.grad_scale_func = self._optimizer.scale_loss
        transformer.finalize_model_grads_func = sum_gradients
        if self._args.overlap_grad_reduce:
            transformer.no_sync_func = _per_chunk([chunk.no_sync for chunk in self._model])
            if self._args.align_grad_reduce:
                starts = [chunk.start_grad_sync for chunk in self._model]
                transformer.grad_sync_func = _per_chunk(starts)
        if self._args.overlap_param_gather:
            starts = [chunk.start_param_sync for chunk in self._model]
            transformer.param_sync_func = _per_chunk(starts)

    def _routing_replay(self) -> RoutingReplay | None:
        from_engine = self._config.use_rollout_routing_replay
        if self._is_critic or not (from_engine or self._config.use_routing_replay):
            return None
        return RoutingReplay(self._model, self._args, from_engine=from_engine)

    def _pad_multiple(self) -> int:
        """Tokens of a pack are padded to a multiple of this; ranks of a sequence share them."""
        ranks = self._args.tensor_model_parallel_size if self._args.sequence_parallel else 1
        # A GPU builds kernels per shape, so it sees few of them; a CPU would compute the padding.
        return ranks * (self._config.data_pad_size_multiplier if self._device.type == "cuda" else 1)

    @property
    def _state(self) -> TrainState:
        return TrainState(
            self._bare, self._optimizer, self._scheduler, self._args, self._vocab_size
        )

    @property
    def _vocab_size(self) -> int:
        return self._architecture.dims.vocab_size

    # Loading and saving

    @without_warnings()
    def load(self) -> int:
        """Load the weights of all models, and training state when resuming; the first rollout.

        Raises:
            CheckpointError: there is nothing to start from, or it is of another model.
        """
        start = resolve_start(self._config, load_step=self._args.ckpt_step)
        self._load_copies()
        if start.resumes:
            load_train_state(self._state, start.source, self._config)
        else:
            self._load_weights(start.source)
        if not start.resumes or self._config.no_load_optim:
            # Main weights of higher precision follow the model's; loaded ones are better than that.
            self._optimizer.reload_model_params()
        if self._config.keep_old_actor and not self._is_critic:
            self._copies.store(ModelTag.OLD_ACTOR)
        first = self._config.start_rollout_id
        if first is None:
            first = start.first_rollout
        logger.info("loaded %s (%s); first rollout %d", start.source.path, start.source.kind, first)
        return first

    def _load_copies(self) -> None:
        """Reference and teacher pass through the live weights, before the actor's own come."""
        if self._is_critic:
            return
        if needs_reference(self._config):
            self._load_weights(reference_source(self._config))
            self._copies.store(ModelTag.REF)
        if self._config.use_opd and self._config.opd_type == "megatron":
            path = self._config.opd_teacher_load
            source = find_source(path, self._config.opd_teacher_ckpt_step) if path else None
            if source is None:
                raise CheckpointError(f"--opd-teacher-load {path} holds no checkpoint.")
            self._load_weights(source)
            self._copies.store(ModelTag.TEACHER)

    def _load_weights(self, source: Source) -> None:
        if source.kind == "hf":
            besides = {HEAD_NAME} if self._is_critic else ()
            load_hf(self._bare, self._architecture, source.path, besides=besides)
        else:
            load_model_weights(self._bare, source, vocab_size=self._vocab_size)

    @without_warnings()
    def save(self, rollout_id: int) -> None:
        """Write `{save}/iter_{rollout_id:07d}`; collective."""
        if self._config.save is None:
            raise ConfigError("There is nowhere to save to; give --save.")
        with self._gathered_weights():
            save_checkpoint(
                self._state,
                self._config.save,
                rollout_id,
                with_optimizer=not self._config.no_save_optim,
            )

    def save_hf(self, path: str) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM` loads; collective."""
        assert self._config.hf_checkpoint is not None
        self._require("actor", "save_hf")
        with self._gathered_weights():
            save_hf(self._bare, self._architecture, path, config_from=self._config.hf_checkpoint)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every parameter; views of live weights."""
        self._require("actor", "named_weights")
        with self._gathered_weights():
            yield from named_weights(self._bare, self._architecture)

    def copy_weights(self, target: ModelTag) -> None:
        """Make `target` (reference, old actor) equal to the current weights."""
        with self._gathered_weights():
            self._copies.store(target)

    @contextlib.contextmanager
    def _gathered_weights(self) -> Iterator[None]:
        """The weights are whole in memory, also when the next forward pass would gather them."""
        self._check_awake()
        if not self._args.overlap_param_gather:
            yield
            return
        for chunk in self._model:
            chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self._model:
                chunk.enable_forward_pre_hook()

    # Forward and backward

    def log_probs(self, batch: RolloutBatch, model: ModelTag) -> list[Tensor]:
        """Log-probs of the response tokens, a whole [R] fp32 CPU tensor per sample."""
        self._require("actor", "log_probs")
        hook = self._config.custom_megatron_before_log_prob_hook_path
        _call_hook(hook, self._plugin_args, self._model, _STORE_PREFIX[model])
        is_live = model is ModelTag.ACTOR or (
            model is ModelTag.OLD_ACTOR and model not in self._copies
        )
        swap = contextlib.nullcontext() if is_live else self._copies.swapped_in(model)
        with self._gathered_weights(), swap:
            is_policy = model in (ModelTag.ACTOR, ModelTag.OLD_ACTOR)
            return self._passes.log_probs(batch, is_policy=is_policy)

    def values(self, batch: RolloutBatch) -> list[Tensor]:
        """The critic's values of the response tokens, a whole [R] fp32 CPU tensor per sample."""
        self._require("critic", "values")
        with self._gathered_weights():
            return self._passes.values(batch)

    def _require(self, role: str, call: str) -> None:
        found = "critic" if self._is_critic else "actor"
        if found != role:
            raise RuntimeError(f"{call}() is a call to a trainer of role {role}; this is a {found}")

    def train_step(self, step: TrainStep, loss_fn: LossFn) -> Metrics:
        """One optimizer step. A gradient that is not finite skips it: `step_skipped` is then 1."""
        self._check_awake()
        if step.step_id == 0 and self._config.reset_optimizer_states:
            reset_moments(self._optimizer)
        self._call_before_step(step)
        zero_gradients(self._model, self._optimizer)
        metrics = self._passes.accumulate_gradients(step, loss_fn)
        lrs = [float(group["lr"]) for group in self._optimizer.param_groups]
        is_updated, grad_norm = guarded_step(self._optimizer, self._args.clip_grad)
        if is_updated:
            self._scheduler.step(increment=step.plan.num_rollouts)
        else:
            logger.warning(
                "rollout %d step %d: gradient norm %s, step skipped",
                step.batch.rollout_id,
                step.step_id,
                grad_norm,
            )
        metrics |= {"grad_norm": grad_norm, "step_skipped": float(not is_updated)}
        return metrics | {f"lr-pg_{i}": lr for i, lr in enumerate(lrs)}

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the data-parallel ranks, on its device; it stays as it is."""
        total = tensor.to(self._device, copy=True)
        add_up(total, dp_group())
        return total.to(tensor.device)

    def sleep(self) -> None:
        """Give the device's memory back until `wake_up`; on a CPU to the same one, as a rehearsal."""
        freed = self._memory.give_back()
        logger.info("the trainer sleeps; %.2f GiB are free", freed / 2**30)

    def wake_up(self) -> None:
        """Take the memory again, every bit as it was, gradients 0."""
        self._memory.take_again()

    def _check_awake(self) -> None:
        if self._memory.is_away:
            raise RuntimeError("the trainer sleeps and has no weights; call wake_up() first")

    def close(self) -> None:
        """Let the model go; for processes that build one trainer after the other.

        Megatron's wrapper, its gradient hooks and the optimizer's views of parameters hold each other
        where Python's collector cannot see it, and with them the weights and the process groups.
        """
        for chunk in self._model:
            wrapper: Any = chunk
            wrapper.grad_accs.clear()
            wrapper.config.grad_scale_func = None
            for parameter in wrapper.parameters():
                vars(parameter).pop("main_param", None)

    def _call_before_step(self, step: TrainStep) -> None:
        _call_hook(
            self._config.custom_megatron_before_train_step_hook_path,
            self._plugin_args,
            step.batch.rollout_id,
            step.step_id,
            self._model,
            self._optimizer,
            self._scheduler,
        )


def _per_chunk(functions: list[Any]) -> Any:
    """What Megatron's schedules take: a function, or a list for virtual pipeline stages."""
    return functions if len(functions) > 1 else functions[0]


def _call_hook(path: str | None, *arguments: Any) -> None:
    if path:
        load_function(path)(*arguments)
