"""summary(): what a run will do, in a dozen lines."""

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from slime.check.data import SFT_ROLLOUT, DataFacts, context_length
from slime.check.model import ModelFacts
from slime.check.places import DiskFacts, gigabytes
from slime.check.plan import Plan
from slime.check.start import StartFacts
from slime.config.config import Config
from slime.config.layout import expert_tensor_size
from slime.plugins import HOOKS

_LABEL_WIDTH = 12
_WIDTH = 100


@dataclass(frozen=True)
class Facts:
    """All that a check found out about a run that can start."""

    config: Config
    model: ModelFacts
    data: list[DataFacts]
    start: StartFacts
    plan: Plan
    disk: DiskFacts


def summary(facts: Facts) -> str:
    """A paragraph for each side of the run, its label in front."""
    rows = {
        "model": _model(facts),
        "data": "; ".join(_data(item) for item in facts.data if item.name is None),
        "start": _start(facts),
        "rounds": _rounds(facts),
        "steps": _steps(facts),
        "tokens": _tokens(facts),
        "devices": _devices(facts),
        "checkpoint": _checkpoint(facts),
        "evaluation": _evaluation(facts),
        "functions": ", ".join(_functions(facts.config)),
        "output": _output(facts),
    }
    return "".join(f"{_paragraph(label, text)}\n" for label, text in rows.items() if text)


def _paragraph(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"{label:<{_LABEL_WIDTH}}",
        subsequent_indent=" " * _LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _model(facts: Facts) -> str:
    model = facts.model
    size = "" if model.num_parameters is None else f", {_count(model.num_parameters)} parameters"
    return f"{model.model_type}, {model.num_layers} layers{size} ({facts.config.hf_checkpoint})"


def _data(item: DataFacts) -> str:
    about = "" if item.is_exact else "about "
    text = f"{about}{item.num_rows:,} prompts in {item.path} ({item.num_checked:,} rows checked"
    if item.longest is not None:
        text += f"; the longest of the first {item.num_templated:,} has {item.longest:,} tokens"
    if item.num_dropped:
        text += f"; {item.num_dropped:,} of them are dropped as too long"
    return text + ")"


def _start(facts: Facts) -> str:
    start = facts.start
    if start.folder is None:
        return f"round {start.first_round}"
    how = "resumes" if start.resumes else "begins"
    return f"{how} at round {start.first_round} with {start.folder}"


def _rounds(facts: Facts) -> str:
    config, plan = facts.config, facts.plan
    num_left = plan.rounds_left
    if num_left is None:
        return f"{config.num_epoch} epochs, {plan.samples_per_round:,} samples each round"
    of = "" if plan.first_round == 0 else f" ({plan.first_round} of {plan.num_rounds} are done)"
    epochs = ""
    if plan.rounds_per_epoch:
        epochs = f"; {num_left / plan.rounds_per_epoch:.3g} epochs of the data"
    return (
        f"{num_left}{of}, each {_many(config.rollout_batch_size or 0, 'prompt')} x "
        f"{_many(config.n_samples_per_prompt, 'sample')} = {plan.samples_per_round:,}{epochs}"
    )


def _steps(facts: Facts) -> str:
    config, plan = facts.config, facts.plan
    if not plan.data_parallel:
        return "none: --debug-rollout-only"
    size, ranks = config.global_batch_size or 1, plan.data_parallel
    if config.use_dynamic_batch_size:
        tokens = (config.max_tokens_per_gpu or 0) * config.context_parallel_size
        parts = f"micro-batches of at most {tokens:,} tokens"
    else:
        per_rank = size // ranks
        parts = f"{per_rank // config.micro_batch_size} micro-batches of {config.micro_batch_size}"
        parts += " a rank"
    total = ""
    if plan.rounds_left is not None:
        total = f", {plan.rounds_left * plan.steps_per_round:,} in all"
    return (
        f"{plan.steps_per_round} per round{total}; {size} samples each over "
        f"{_many(ranks, 'data-parallel rank')}, {parts}"
    )


def _tokens(facts: Facts) -> str:
    config, plan = facts.config, facts.plan
    if not plan.slots.rollout or config.rollout_function_path == SFT_ROLLOUT:
        return ""
    limit = config.rollout_max_response_len or context_length(config)
    if limit is None:
        return "answers are as long as the engine lets them be"
    text = f"answers of at most {limit:,}: {plan.samples_per_round * limit:,} per round"
    if plan.rounds_left is not None:
        text += f", {_count(plan.rounds_left * plan.samples_per_round * limit)} in all"
    return text


def _devices(facts: Facts) -> str:
    config, slots = facts.config, facts.plan.slots
    parts: list[str] = []
    if slots.train:
        parts.append(
            f"{_many(slots.train, 'training rank')} "
            f"({config.actor_num_nodes} x {config.actor_num_gpus_per_node}{_layout(facts)})"
        )
    if config.rollout_external_engine_addrs:
        many = _many(len(config.rollout_external_engine_addrs), "engine")
        parts.append(f"{many} that somebody else runs")
    if slots.rollout:
        size = config.rollout_num_gpus_per_engine
        num_engines = slots.rollout // size
        each = f" of {size} slots" if size > 1 else ""
        parts.append(f"{_many(num_engines, 'engine')}{each}")
    sharing = ", sharing slots" if config.colocate and len(parts) > 1 else ""
    device = "cpu" if config.device == "auto" else config.device
    cores = f" on {os.cpu_count()} cores here" if device == "cpu" else ""
    return f"{device}: {_many(slots.total, 'slot')}{cores}: {' and '.join(parts)}{sharing}"


def _layout(facts: Facts) -> str:
    """`; tensor 2 x pipeline 2 x data 2`: how the ranks share the model, if they do."""
    config = facts.config
    sizes = {
        "tensor": config.tensor_model_parallel_size,
        "context": config.context_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
    }
    text = ""
    if max(sizes.values()) > 1:
        sizes["data"] = facts.plan.data_parallel
        text = "; " + " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if (experts := config.expert_model_parallel_size) > 1:
        own = expert_tensor_size(config)
        text += f"; experts over {experts}" + (f" x tensor {own}" if own > 1 else "")
    return text


def _checkpoint(facts: Facts) -> str:
    config, plan, disk = facts.config, facts.plan, facts.disk
    if config.save is None:
        return "none: give --save DIR to keep the model"
    if not plan.saves:
        return f"none before the end, in {config.save}"
    often = "after the last round only"
    if config.save_interval is not None:
        often = _period(config.save_interval, plan)
    text = f"{often}, {len(plan.saves)} in {config.save}"
    if disk.one_checkpoint is not None:
        text += f", about {gigabytes(disk.one_checkpoint)} each"
    if config.save_hf is not None:
        size = "" if disk.one_hf_folder is None else f" (about {gigabytes(disk.one_hf_folder)})"
        text += f", as Hugging Face folder{size} in {config.save_hf}"
    if disk.total is not None and disk.free is not None:
        text += f"; {gigabytes(disk.total)} of {gigabytes(disk.free)} that are free"
    return text


def _evaluation(facts: Facts) -> str:
    config = facts.config
    if config.eval_interval is None or config.debug_train_only:
        return ""
    samples = {item.name: item.n_samples_per_eval_prompt for item in config.eval_datasets}
    sets = [
        f"{item.name} ({item.num_rows:,} prompts x {_many(samples.get(item.name) or 1, 'sample')})"
        for item in facts.data
        if item.name is not None
    ]
    return (
        f"{_period(config.eval_interval, facts.plan)}, {facts.plan.evaluations} times in all: "
        f"{', '.join(sets) or config.eval_function_path}"
    )


def _period(interval: int, plan: Plan) -> str:
    rounds = f"every {interval} rounds" if interval > 1 else "every round"
    if interval > 1 and plan.rounds_per_epoch:
        rounds += f", at the end of each epoch ({_many(plan.rounds_per_epoch, 'round')})"
    return f"{rounds} and at the end"


def _functions(config: Config) -> Iterator[str]:
    """Those that are not slime's own."""
    for name in HOOKS:
        value: str | tuple[str, ...] | None = getattr(config, name)
        for path in (value,) if isinstance(value, str) else value or ():
            if not path.startswith("slime."):
                yield path


def _output(facts: Facts) -> str:
    boards = " and TensorBoard files" if facts.config.use_tensorboard else ""
    return f"{facts.config.run_dir or 'runs/<start time>'}: metrics, samples, logs{boards}"


def _many(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    """`0.22 M`: a large number in words."""
    for size, name in ((1e12, " T"), (1e9, " B"), (1e5, " M")):
        if number >= size:
            return f"{number / (1e6 if name == ' M' else size):.3g}{name}"
    return f"{number:,}"
