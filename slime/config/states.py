"""The state of every flag: it works, we do it our own way, or it is refused by name.

No flag is accepted and ignored. A flag of slime that no table below names works. A flag of Megatron
that no table names is refused: it may work, but nobody has tried it with slime's trainer.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from slime import registry
from slime.config.fields import Option


class State(StrEnum):
    """What happens when the flag is given."""

    WORKS = "works"
    OWN_WAY = "own way"
    REFUSED = "refused"


@dataclass(frozen=True)
class FlagState:
    """State of one flag.

    Attributes:
        note: OWN_WAY: what happens instead; REFUSED: why, and what to do.
        only: values that work although the others are refused.
    """

    state: State
    note: str = ""
    only: tuple[Any, ...] = ()

    def allows(self, value: Any, default: Any) -> bool:
        """Whether `value` may be given; a refused flag may repeat its default.

        Of a flag that takes several values each must be one of `only`.
        """
        if value in self.only:
            return True
        if isinstance(value, tuple) and value and self.only:
            values = cast(tuple[Any, ...], value)
            return all(one in self.only for one in values)
        if self.state is State.REFUSED:
            return value == default
        return not self.only


WORKS = FlagState(State.WORKS)


def own_way(note: str) -> FlagState:
    """Accepted; `note` says what happens instead."""
    return FlagState(State.OWN_WAY, note)


def refused(note: str, *only: Any) -> FlagState:
    """An error, unless the value is the default or one of `only`."""
    return FlagState(State.REFUSED, note, only)


def works_with(note: str, *only: Any) -> FlagState:
    """Works for the values `only`; `note` says why not for the others."""
    return FlagState(State.WORKS, note, only)


_PPO = "not built yet: PPO with a critic"
_DISPATCHER = "always all-to-all, which takes packs of any length"
_UPCYCLING = "not built yet: making experts of a dense model"
_BALANCE = (
    "experts would be chosen in another way than engines choose them, or losses added that are not "
    "sums over a step"
)
_LATENTS = "fusions and caches of multi-latent attention are not built"
_MTP = "not built yet: multi-token prediction"
_FP8 = "needs TransformerEngine, which slime does without"
_OPD = "not built yet: on-policy distillation"
_BUFFER = "not built yet: the HTTP rollout buffer"
_PROFILE = "not built yet: the torch profiler"
_MEMORY = "not built yet: recording memory history"
_DEEPGEMM = "not built yet: bit-exact DeepGEMM forward passes"
_SPARSE = "not built yet: DeepSeek sparse attention"
_CI = "not built yet: slime's own tests check these numbers"

SLIME_STATES: dict[str, FlagState] = {
    "--num-gpus-per-node": own_way(
        "Ray's placement group finds the nodes; an engine must not be larger than this"
    ),
    "--check-weight-update-equal": own_way("every sync is checked: --verify-weight-sync"),
    "--distributed-backend": own_way("follows from the device: NCCL on CUDA, gloo on CPU"),
    "--save-debug-train-data": refused("not built yet: dumping train data"),
    "--dump-details": refused("not built yet: dumping train data; --save-debug-rollout-data works"),
    "--advantage-estimator": works_with(_PPO, *registry.ALGORITHMS.names()),
    "--num-critic-only-steps": refused(_PPO),
    "--megatron-config-path": refused("not built yet: overrides per role"),
    "--qwen-gdn-backend": refused("not built yet: linear attention"),
    "--release-train": refused("not built yet: ending the trainer during rollouts"),
    "--recompute-loss-function": own_way(
        "log-probs never keep logits; a custom_loss is called again in the backward pass"
    ),
    "--freeze-indexer": refused(_SPARSE),
    "--allgather-cp": refused(_SPARSE),
    "--megatron-deepgemm-forward-layers": refused(_DEEPGEMM),
    "--megatron-deepgemm-forward-modules": refused(_DEEPGEMM),
    "--megatron-deepgemm-moe-forward-layers": refused(_DEEPGEMM),
    "--megatron-deepgemm-moe-forward-modules": refused(_DEEPGEMM),
    "--enable-mtp-training": refused(_MTP),
    "--rollout-top-p": refused(
        "not built yet: replaying the nucleus in the trainer, without which log-probs differ"
    ),
    "--keep-old-actor": refused("not built yet: a copy of the policy that generated"),
    "--rollout-data-transport": refused("not built yet: NIXL"),
    "--rollout-buffer-url": refused(_BUFFER),
    "--fetch-trajectory-retry-times": refused(_BUFFER),
    "--min-batch-collection-ratio": refused(_BUFFER),
    "--rollout-task-type": refused(_BUFFER),
    "--prefill-num-servers": refused("not built yet: splitting prefill and decode"),
    "--sglang-config": refused("not built yet: several models and groups of servers"),
    "--multimodal-keys": refused("not built yet: images and other media"),
    "--log-probs-max-tokens-per-gpu": own_way(
        "one packing serves log-prob and training passes: --max-tokens-per-gpu"
    ),
    "--value-clip": refused(_PPO),
    "--lambd": refused(_PPO),
    "--ref-update-interval": refused("not built yet: moving the reference"),
    "--use-rollout-entropy": refused("not built yet: entropy in the log-prob pass"),
    "--use-stateless-adam": refused("not built yet: Adam without moments"),
    "--use-opd": refused(_OPD),
    "--opd-type": refused(_OPD),
    "--opd-kl-coef": refused(_OPD),
    "--opd-teacher-load": refused(_OPD),
    "--opd-teacher-ckpt-step": refused(_OPD),
    "--load-forge-rollout-data": refused("not built yet: replaying recorded rollouts"),
    "--memory-snapshot-dir": refused(_MEMORY),
    "--memory-snapshot-num-steps": refused(_MEMORY),
    "--memory-recorder": refused(_MEMORY),
    "--record-memory-history": refused(_MEMORY),
    "--profile-target": refused(_PROFILE),
    "--http-proxy": refused("slime calls its engines directly, without a proxy; leave it out"),
    "--use-distributed-post": refused("one client per process keeps up; leave it out"),
    "--ci-test": refused(_CI),
    "--ci-disable-kl-checker": refused(_CI),
    "--ci-train-rollout-logprob-abs-diff-threshold": refused(_CI),
    "--ci-save-grad-norm": refused(_CI),
    "--ci-load-grad-norm": refused(_CI),
    "--async-save": refused("not built yet: saving while training goes on"),
    "--fp16": refused("not built yet: float16; bfloat16 and float32 work"),
    "--mtp-num-layers": refused(_MTP, 0),
    "--mtp-loss-scaling-factor": refused(_MTP),
}

_OWN_ATTENTION = "slime's own attention, exact and packed, is used"
_NO_FUSION = "slime's layers have no such fused kernel to switch off"
_OWN_CHECKPOINT = "slime writes checkpoints its own way; this is always so"

MEGATRON_STATES: dict[str, FlagState] = {
    # The model: MODEL_ARGS of scripts/models.
    "--num-attention-heads": WORKS,
    "--group-query-attention": WORKS,
    "--num-query-groups": WORKS,
    "--kv-channels": WORKS,
    "--ffn-hidden-size": WORKS,
    "--normalization": works_with("only RMSNorm is built", "RMSNorm"),
    "--norm-epsilon": WORKS,
    "--qk-layernorm": WORKS,
    "--swiglu": WORKS,
    "--disable-bias-linear": WORKS,
    "--add-qkv-bias": WORKS,
    "--untie-embeddings-and-output-weights": WORKS,
    "--position-embedding-type": works_with("only rope is built", "rope"),
    "--use-rotary-position-embeddings": WORKS,
    "--rotary-base": WORKS,
    "--rotary-percent": WORKS,
    "--rotary-seq-len-interpolation-factor": WORKS,
    "--use-rope-scaling": WORKS,
    "--rope-scaling-factor": WORKS,
    "--max-position-embeddings": WORKS,
    "--seq-length": WORKS,
    "--make-vocab-size-divisible-by": WORKS,
    "--attention-dropout": works_with("dropout is not built: give 0", 0.0),
    "--hidden-dropout": works_with("dropout is not built: give 0", 0.0),
    "--rotary-interleaved": WORKS,
    "--spec": WORKS,
    "--post-self-attn-layernorm": own_way("follows from model_type in --hf-checkpoint"),
    "--post-mlp-layernorm": own_way("follows from model_type in --hf-checkpoint"),
    "--use-gated-attention": refused("not built yet: gated attention"),
    "--multi-latent-attention": WORKS,
    "--q-lora-rank": WORKS,
    "--kv-lora-rank": WORKS,
    "--qk-head-dim": WORKS,
    "--qk-pos-emb-head-dim": WORKS,
    "--v-head-dim": WORKS,
    "--rotary-scaling-factor": WORKS,
    "--mscale": WORKS,
    "--mscale-all-dim": WORKS,
    "--rope-type": WORKS,
    # Kernels: slime has its own layers, without TransformerEngine and Apex.
    "--transformer-impl": works_with(
        "local, slime's own layers, unless given; TransformerEngine's modules where it is installed",
        "local",
        "transformer_engine",
    ),
    "--attention-backend": own_way(_OWN_ATTENTION),
    "--use-flash-attn": own_way(_OWN_ATTENTION),
    "--attention-softmax-in-fp32": own_way(f"{_OWN_ATTENTION}; its softmax is in float32"),
    "--no-gradient-accumulation-fusion": own_way("gradients are always added in fp32, by torch"),
    "--no-rope-fusion": own_way("always so: the fusion needs TransformerEngine"),
    "--no-masked-softmax-fusion": own_way(_NO_FUSION),
    "--no-bias-gelu-fusion": own_way(_NO_FUSION),
    "--no-bias-swiglu-fusion": own_way(_NO_FUSION),
    "--no-bias-dropout-fusion": own_way(_NO_FUSION),
    "--no-persist-layer-norm": own_way(_NO_FUSION),
    "--moe-grouped-gemm": own_way("always so: experts run as one grouped product"),
    "--moe-permute-fusion": own_way("always so: tokens are permuted by kernels of our own"),
    # Optimizer and schedule.
    "--optimizer": works_with("only adam is built", "adam"),
    "--weight-decay": WORKS,
    "--start-weight-decay": WORKS,
    "--end-weight-decay": WORKS,
    "--weight-decay-incr-style": WORKS,
    "--adam-beta1": WORKS,
    "--adam-beta2": WORKS,
    "--adam-eps": WORKS,
    "--min-lr": WORKS,
    "--lr-decay-style": WORKS,
    "--lr-decay-iters": WORKS,
    "--lr-wsd-decay-style": WORKS,
    "--lr-wsd-decay-iters": WORKS,
    "--lr-warmup-iters": WORKS,
    "--lr-warmup-fraction": WORKS,
    "--lr-warmup-init": WORKS,
    "--override-opt_param-scheduler": WORKS,
    "--use-checkpoint-opt_param-scheduler": WORKS,
    "--use-distributed-optimizer": own_way("always so"),
    "--accumulate-allreduce-grads-in-fp32": WORKS,
    "--overlap-grad-reduce": WORKS,
    "--ddp-bucket-size": WORKS,
    "--ddp-num-buckets": WORKS,
    "--overlap-param-gather": WORKS,
    "--optimizer-cpu-offload": WORKS,
    "--optimizer-offload-fraction": WORKS,
    "--overlap-cpu-optimizer-d2h-h2d": own_way("copies to the card and back always overlap"),
    "--use-torch-optimizer-for-cpu-offload": own_way("torch's Adam is always used"),
    "--no-pin-cpu-grads": own_way("gradients stay on the card"),
    "--no-pin-cpu-params": own_way("what is on the host is always pinned"),
    "--use-precision-aware-optimizer": WORKS,  # with --optimizer-cpu-offload: rules.py
    "--train-iters": own_way("follows from --num-rollout"),
    # Memory.
    "--recompute-granularity": WORKS,
    "--recompute-method": WORKS,
    "--recompute-num-layers": WORKS,
    "--recompute-modules": works_with(
        "the other parts are recomputed by code that Megatron has from TransformerEngine",
        "core_attn",
        "mlp",
        "moe",
        "shared_experts",
    ),
    # Parallel layouts of the launch scripts.
    "--decoder-first-pipeline-num-layers": WORKS,
    "--decoder-last-pipeline-num-layers": WORKS,
    # Checkpoints.
    "--ckpt-step": WORKS,
    "--ckpt-format": works_with(
        "tools/convert_to_hf.py turns torch into a folder that --load takes", "torch_dist"
    ),
    "--no-save-rng": refused("the random state is always saved; --no-load-rng works"),
    "--use-persistent-ckpt-worker": own_way(_OWN_CHECKPOINT),
    "--ckpt-assume-constant-structure": own_way(_OWN_CHECKPOINT),
    "--ckpt-fully-parallel-load": own_way(_OWN_CHECKPOINT),
    "--ckpt-fully-parallel-save": own_way(_OWN_CHECKPOINT),
    "--dist-ckpt-save-pre-mcore-014": own_way(_OWN_CHECKPOINT),
    # Mixture of experts.
    "--num-experts": WORKS,
    "--moe-layer-freq": WORKS,
    "--moe-ffn-hidden-size": WORKS,
    "--moe-shared-expert-intermediate-size": WORKS,
    "--moe-router-topk": WORKS,
    "--moe-router-score-function": works_with(
        "no family that slime knows has it", "softmax", "sigmoid"
    ),
    "--moe-router-pre-softmax": WORKS,
    "--moe-router-enable-expert-bias": WORKS,
    "--moe-router-bias-update-rate": WORKS,
    "--moe-router-topk-scaling-factor": WORKS,
    "--moe-router-num-groups": WORKS,
    "--moe-router-group-topk": WORKS,
    "--moe-router-load-balancing-type": works_with(
        _BALANCE, "none", "aux_loss", "seq_aux_loss", "global_aux_loss"
    ),
    "--moe-aux-loss-coeff": works_with(f"not built: {_BALANCE}", 0.0),
    "--moe-token-dispatcher-type": own_way(_DISPATCHER),
    "--moe-token-drop-policy": own_way("no token is dropped"),
    "--moe-router-dtype": works_with("engines choose experts in fp32", "fp32"),
    "--moe-enable-deepep": own_way(_DISPATCHER),
    "--moe-flex-dispatcher-backend": own_way(_DISPATCHER),
    # Low precision, profiles, reproducibility.
    "--fp8-format": refused(_FP8),
    "--fp8-recipe": refused(_FP8),
    "--fp8-param-gather": refused(_FP8),
    "--use-pytorch-profiler": refused(_PROFILE),
    "--profile-step-start": refused(_PROFILE),
    "--profile-step-end": refused(_PROFILE),
    "--memory-snapshot-path": refused(_MEMORY),
    "--deterministic-mode": WORKS,
}

# Reasons for whole groups of Megatron's options, as its parser names them.
MEGATRON_GROUPS: dict[str, str] = {
    "rl": "Megatron's own RL loop is not used; see slime's flags for the same",
    "data and dataloader": "slime trains on rollouts and has no such data loader",
    "tokenizer": "the tokenizer is that of --hf-checkpoint",
    "validation": "slime evaluates by --eval-prompt-data",
    "logging": "slime logs its own way: metrics.jsonl, --use-tensorboard",
    "inference": "engines generate, not Megatron",
    "profiling": _PROFILE,
    "Transformer-Engine": _FP8,
    "moe": _UPCYCLING,
    "mla": _LATENTS,
    "sft": "slime's SFT is --loss-type sft_loss",
    "biencoder": "not a model slime trains",
    "vision": "not a model slime trains",
}
_UNTRIED = "nobody has tried this flag of Megatron with slime's trainer yet; leave it out"

_ENGINE_SETS = "slime sets it for each engine; leave it out"
SGLANG_REFUSED: dict[str, str] = {
    "model_path": "it is --hf-checkpoint",
    "config": _ENGINE_SETS,
    "trust_remote_code": _ENGINE_SETS,
    "random_seed": "it follows from --seed",
    "enable_memory_saver": "it follows from --offload-rollout",
    "tp_size": "it follows from --rollout-num-gpus-per-engine",
    "port": _ENGINE_SETS,
    "nnodes": _ENGINE_SETS,
    "node_rank": _ENGINE_SETS,
    "dist_init_addr": _ENGINE_SETS,
    "gpu_id_step": _ENGINE_SETS,
    "base_gpu_id": _ENGINE_SETS,
    "nccl_port": _ENGINE_SETS,
    "skip_server_warmup": _ENGINE_SETS,
    "enable_return_routed_experts": "it follows from --use-rollout-routing-replay",
}
# What SGLang's server and the embedded engine have in common; the latter refuses the others.
EMBEDDED_ENGINE_OPTIONS = (
    "context_length",
    "max_running_requests",
    "log_level",
    "served_model_name",
    "api_key",
)

_ROUTER_SETS = "slime starts the router and registers its engines; leave it out"
ROUTER_REFUSED: dict[str, str] = {
    "host": _ROUTER_SETS,
    "port": "it is --sglang-router-port",
    "worker_urls": _ROUTER_SETS,
    "request_timeout_secs": "it is --sglang-router-request-timeout-secs",
    "prefill": _ROUTER_SETS,
    "decode": _ROUTER_SETS,
    "encode": _ROUTER_SETS,
}


def state_of(option: Option) -> FlagState:
    """The state of `option`, whoever owns it."""
    name = option.name
    if option.owner == "sglang":
        reason = SGLANG_REFUSED.get(option.dest)
        return WORKS if reason is None else refused(reason)
    if option.owner == "router":
        reason = ROUTER_REFUSED.get(option.dest)
        return WORKS if reason is None else refused(reason)
    if name in SLIME_STATES:
        return SLIME_STATES[name]
    if name in MEGATRON_STATES:
        return MEGATRON_STATES[name]
    if option.owner == "megatron":
        return refused(MEGATRON_GROUPS.get(option.group, _UNTRIED))
    return WORKS
