"""Rules about engines: what a server would say only when it loads, and those that somebody else runs."""

from collections.abc import Iterator
from typing import Any

from slime.config.config import Config
from slime.config.foreign import megatron_values
from slime.errors import ConfigError

_EXTERNAL = "--rollout-external-engine-addrs"
_SIZE = "--rollout-num-gpus-per-engine"


def engine_sizes(config: Config) -> Iterator[str]:
    """What is wrong with how an engine on GPUs shares the model among its devices."""
    is_sglang = config.rollout_engine == "auto" and config.device == "cuda"
    is_external = config.rollout_external_engine_addrs is not None
    if not is_sglang or is_external or config.debug_train_only:
        return
    size, pipeline = config.rollout_num_gpus_per_engine, config.sglang_argv.get("pp_size", 1)
    if size % pipeline:
        return  # told already
    tensor = size // pipeline
    yield from _attention(config, tensor)
    yield from _experts(config, tensor)


def external_engines(config: Config) -> Iterator[str]:
    """What does not go with engines that somebody else runs."""
    if config.rollout_external_engine_addrs is None or config.debug_train_only:
        return
    urls = external_urls(config)
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        yield f"{_EXTERNAL}: {', '.join(twice)} is there more than once"
    if config.colocate or config.offload_rollout:
        yield (
            f"{_EXTERNAL} with --colocate or --offload-rollout: those engines have devices of their "
            "own, which the trainer cannot share; leave one of them out"
        )
    options = sorted(set(config.sglang_argv) - {"api_key"})
    if options:
        names = ", ".join("--sglang-" + name.replace("_", "-") for name in options)
        yield f"{names}: {_EXTERNAL} names servers that run already; start them with these options"


def external_urls(config: Config) -> tuple[str, ...]:
    """Addresses of the engines that somebody else runs, `http://host:port`; empty without any.

    Raises:
        ConfigError: one of them is no address.
    """
    urls: list[str] = []
    for address in config.rollout_external_engine_addrs or ():
        host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
        if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"{_EXTERNAL} {address}: give host:port, as in 10.0.0.7:30000")
        urls.append(f"http://{host}:{port}")
    return tuple(urls)


def pausing(config: Config) -> Iterator[str]:
    """What is wrong with how weights reach engines that are at work."""
    mode = config.update_weight_pause_mode
    is_sglang = config.rollout_engine == "sglang" or (
        config.rollout_engine == "auto" and config.device == "cuda"
    )
    if not is_sglang or mode in (None, "abort"):
        return
    if config.colocate and config.offload_rollout is not False:
        yield (
            f"--update-weight-pause-mode {mode}: SGLang that leaves the trainer's devices in its turn takes "
            "weights with abort only; leave it out, or let both sides stay: --no-offload-train "
            "--no-offload-rollout"
        )
    elif not config.sglang_argv.get("disable_radix_cache"):
        yield (
            f"--update-weight-pause-mode {mode}: SGLang would keep in its prefix cache what it read "
            "with the old weights, and later prompts would use it; add --sglang-disable-radix-cache, "
            "or use abort, which is exact and keeps that cache"
        )


def routing(config: Config) -> Iterator[str]:
    """What is wrong with the router's policy."""
    policy = config.router_argv.get("policy")
    if policy == "power_of_two" and config.sglang_router_ip is None:
        yield (
            "--router-policy power_of_two: the router wants to know its engines when it starts, and "
            "slime's register once they serve; leave it out: by default a request goes to the engine "
            "with the fewest"
        )


def _attention(config: Config, tensor: int) -> Iterator[str]:
    has_copies = config.sglang_argv.get("enable_dp_attention", False)
    copies = config.sglang_argv.get("dp_size", 1) if has_copies else 1
    if tensor % copies:
        yield (
            f"--sglang-dp-size {copies} does not divide the {tensor} devices of an engine's tensor "
            f"parallelism ({_SIZE}); choose another size"
        )
        return
    ranks, megatron = tensor // copies, megatron_values(config.megatron_argv)
    counts: dict[str, Any] = {"--num-attention-heads": megatron["num_attention_heads"]}
    if megatron["group_query_attention"]:
        counts["--num-query-groups"] = megatron["num_query_groups"]
    for flag, count in counts.items():
        # Ranks may share a group of keys: each of them then holds a copy.
        if count and count % ranks and (flag == "--num-attention-heads" or ranks % count):
            yield (
                f"an engine's attention is shared by {ranks} devices ({_SIZE}, less pipeline and "
                f"--sglang-dp-size), which does not divide {flag} {count}; choose another size"
            )


def _experts(config: Config, tensor: int) -> Iterator[str]:
    ranks = config.sglang_argv.get("ep_size", 1)
    num_experts = megatron_values(config.megatron_argv)["num_experts"] or 0
    if ranks > 1 and not num_experts:
        yield f"--sglang-ep-size {ranks}: the model has no experts (--num-experts); leave it out"
    elif num_experts % ranks:
        yield f"--sglang-ep-size {ranks} does not divide --num-experts {num_experts}"
    if tensor % ranks:
        yield (
            f"--sglang-ep-size {ranks} does not divide the {tensor} devices of an engine's tensor "
            f"parallelism ({_SIZE}); choose another size"
        )
    dense = config.sglang_argv.get("moe_dense_tp_size")
    if dense not in (None, 1, tensor):
        yield f"--sglang-moe-dense-tp-size {dense}: SGLang knows 1 and {tensor}, the whole engine"
