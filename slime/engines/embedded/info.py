"""EngineInfo: what an engine tells about itself: model, load, metrics."""

from importlib import metadata

from slime.engines.embedded.args import ServerArgs
from slime.engines.embedded.scheduler import Scheduler
from slime.engines.embedded.selfcheck import CheckedRunner
from slime.engines.embedded.stats import prometheus_text
from slime.engines.protocol import Json


class EngineInfo:
    """Reads the scheduler without asking its thread, so numbers are a step old at worst.

    Args:
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self,
        args: ServerArgs,
        checked: CheckedRunner,
        scheduler: Scheduler,
        eos_ids: tuple[int, ...],
    ) -> None:
        self._args = args
        self._checked = checked
        self._scheduler = scheduler
        self._eos_ids = eos_ids

    def metrics(self) -> str:
        """Prometheus text."""
        load = self.load()
        gauges = {
            "num_running_reqs": load["num_running_reqs"],
            "num_queue_reqs": load["num_waiting_reqs"],
            "num_used_tokens": load["num_used_tokens"],
            "max_running_requests": load["max_running_requests"],
            "token_usage": load["token_usage"],
            "gen_throughput": load["gen_throughput"],
        }
        return prometheus_text(gauges, self._scheduler.stats, self._args.model_name)

    def load(self) -> Json:
        """How busy the engine is; read without waiting for it, so a step behind at worst."""
        scheduler = self._scheduler
        running, waiting = scheduler.table.active, len(scheduler.waiting)
        used = int(scheduler.table.lengths[:running].sum())
        capacity = scheduler.limits.max_running * scheduler.runner.context_length
        return {
            "dp_rank": 0,
            "num_reqs": running + waiting,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_tokens": used,
            "num_used_tokens": used,
            "max_total_num_tokens": capacity,
            "max_running_requests": scheduler.limits.max_running,
            "token_usage": used / capacity,
            "gen_throughput": scheduler.stats.throughput,
            "cache_hit_rate": 0.0,
            "utilization": running / scheduler.limits.max_running,
        }

    def v1_loads(self) -> Json:
        """`load` in the form of /v1/loads."""
        load = self.load()
        aggregate = {
            "total_running_reqs": load["num_running_reqs"],
            "total_waiting_reqs": load["num_waiting_reqs"],
            "total_reqs": load["num_total_reqs"],
        }
        return {"version": version(), "dp_rank_count": 1, "loads": [load], "aggregate": aggregate}

    def model(self) -> Json:
        """What is served."""
        config = self._checked.runner.config
        return {
            "model_path": self._args.model_path,
            "tokenizer_path": self._args.tokenizer_path or self._args.model_path,
            "served_model_name": self._args.model_name,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": self._scheduler.weight_version,
            "model_type": config.model_type,
            "architectures": self._checked.runner.model.config.architectures,
            "vocab_size": self._checked.runner.vocab_size,
            "max_context_length": self._checked.runner.context_length,
            "max_model_len": self._checked.runner.context_length,
            "eos_token_ids": list(self._eos_ids),
        }

    def server(self) -> Json:
        """How it is served."""
        checked, args = self._checked, self._args
        return {
            **self.model(),
            "slime_engine": "embedded",
            "version": version(),
            "status": "ready",
            "host": args.host,
            "port": args.port,
            "tp_size": 1,
            "dp_size": 1,
            "pp_size": 1,
            "dtype": args.dtype,
            "random_seed": args.random_seed,
            "context_length": checked.runner.context_length,
            "max_running_requests": args.max_running_requests,
            "max_prefill_tokens": args.max_prefill_tokens,
            "attention_backend": checked.runner.attention,
            "self_check_difference": checked.difference,
            "batch_invariant": checked.is_invariant,
            "enable_deterministic_inference": args.enable_deterministic_inference,
            "num_threads": args.num_threads,
        }

    def models(self) -> Json:
        """The served model in OpenAI's form."""
        card = {
            "id": self._args.model_name,
            "object": "model",
            "owned_by": "slime",
            "root": self._args.model_path,
            "max_model_len": self._checked.runner.context_length,
        }
        return {"object": "list", "data": [card]}

    def weight_version(self) -> Json:
        """The version stamped on answers now."""
        return {"weight_version": self._scheduler.weight_version}


def version() -> str:
    """Version of slime."""
    try:
        return metadata.version("slime")
    except metadata.PackageNotFoundError:
        return "0.0.0"
