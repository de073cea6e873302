"""check_data(): the first rows of each file, read, templated and counted as a run would."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from slime.check.rows import RowCheck
from slime.config.checkpoints import is_hf_folder, read_hf_config
from slime.config.config import Config
from slime.config.problems import Problems
from slime.config.rules import DEFAULT_DATA_SOURCE
from slime.data.dataset import DatasetSpec, read_rows, split_slice
from slime.data.templates import TOKENIZER_FILES, FolderTokenizer, has_tokenizer
from slime.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
# Bounds of one file, so that a check of anything ends in time.
MAX_ROWS = 5000
MAX_BYTES = 8 * 2**20
MAX_COUNTED_BYTES = 256 * 2**20
MAX_BROKEN_ROWS = 3


@dataclass(frozen=True)
class DataFacts:
    """What one file of prompts holds.

    Attributes:
        name: None for --prompt-data, else the name of the evaluation.
        num_rows: rows in the slice; an estimate when `is_exact` is False.
        num_checked: rows that were read.
        num_templated: rows whose prompt was counted in tokens.
        num_dropped: of those, longer than the limit, so that a run leaves them out.
        longest: tokens of the longest prompt that is kept; None when nothing was counted.
    """

    name: str | None
    path: str
    num_rows: int
    is_exact: bool
    num_checked: int
    num_templated: int
    num_dropped: int
    longest: int | None

    @property
    def num_kept(self) -> int:
        """Rows that a run keeps, as far as they were looked at."""
        return self.num_rows - self.num_dropped


def check_data(config: Config, problems: Problems) -> list[DataFacts]:
    """What is in the files; everything that is wrong with them is noted."""
    view = problems.readable(config)
    tokenizer: FolderTokenizer | None = None
    with problems.caught():
        tokenizer = _tokenizer(view.hf_checkpoint, problems)
    context: int | None = None
    with problems.caught():
        context = context_length(view)
    facts: list[DataFacts] = []
    for name, spec in _specs(config, problems):
        if not split_slice(spec.path)[0].is_file():
            continue  # the rules say so
        is_sft = name is None and config.rollout_function_path == SFT_ROLLOUT
        rows = RowCheck(spec, tokenizer, context=context, is_sft=is_sft)
        try:
            facts.append(_check_file(name, spec, rows, problems))
        except DataError as error:
            problems.add(str(error))
    return facts


def context_length(config: Config) -> int | None:
    """Most tokens of prompt and answer that an engine takes; None without an engine."""
    if config.debug_train_only:
        return None
    asked = config.sglang_argv.get("context_length")
    if asked is not None:
        return int(asked)
    if config.hf_checkpoint is None or not is_hf_folder(config.hf_checkpoint):
        return None
    return read_hf_config(config.hf_checkpoint).get("max_position_embeddings")


def _tokenizer(folder: str | None, problems: Problems) -> FolderTokenizer | None:
    if folder is None or not is_hf_folder(folder):
        return None  # the rules say so
    try:
        tokenizer = FolderTokenizer(folder)
    except CheckpointError as error:
        problems.add(f"--hf-checkpoint: {error}")
        return None
    if tokenizer.has_own_code:
        logger.warning(
            "the tokenizer in %s is code of its own, which this check does not run: prompts are "
            "not templated and not counted",
            folder,
        )
        return None
    if not has_tokenizer(folder):
        problems.add(
            f"--hf-checkpoint {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "copy these files from where the model came from"
        )
        return None
    if not tokenizer.can_count:
        logger.warning("%s has no tokenizer.json: the tokens of prompts are not counted", folder)
    return tokenizer


def _specs(config: Config, problems: Problems) -> Iterator[tuple[str | None, DatasetSpec]]:
    view = problems.readable(config)
    with problems.caught():
        if reads_prompts(view) and view.prompt_data is not None:
            yield (
                None,
                DatasetSpec(
                    path=view.prompt_data,
                    input_key=view.input_key,
                    label_key=view.label_key,
                    metadata_key=view.metadata_key,
                    tool_key=view.tool_key,
                    apply_chat_template=view.apply_chat_template,
                    apply_chat_template_kwargs=view.apply_chat_template_kwargs,
                    max_prompt_len=view.rollout_max_prompt_len,
                ),
            )
    with problems.caught():
        for dataset in view.eval_datasets:
            yield (
                dataset.name,
                DatasetSpec(
                    path=dataset.path,
                    input_key=dataset.input_key or view.input_key,
                    label_key=dataset.label_key,
                    metadata_key=dataset.metadata_key or view.metadata_key,
                    tool_key=dataset.tool_key or view.tool_key,
                    apply_chat_template=bool(dataset.apply_chat_template),
                    apply_chat_template_kwargs=dataset.apply_chat_template_kwargs or {},
                    max_prompt_len=dataset.max_prompt_len,
                ),
            )


def reads_prompts(config: Config) -> bool:
    """Whether the run reads --prompt-data."""
    return (
        config.data_source_path == DEFAULT_DATA_SOURCE
        and not config.disable_rollout_global_dataset
        and config.load_debug_rollout_data is None
    )


def _check_file(
    name: str | None, spec: DatasetSpec, rows: RowCheck, problems: Problems
) -> DataFacts:
    file, given = split_slice(spec.path)
    total, is_exact = count_rows(file)
    start, stop, _ = given.indices(total)
    num_rows = max(stop - start, 0)
    mean_bytes = max(file.stat().st_size // max(total, 1), 1)
    limit = min(num_rows, MAX_ROWS, max(MAX_BYTES // mean_bytes, 1))
    num_checked = 0
    for where, row in _rows(replace(spec, path=f"{file}@[{start}:{start + limit}]"), problems):
        num_checked += 1
        rows.check(where, row)
    rows.finish(problems, all_rows=num_checked == num_rows)
    return DataFacts(
        name=name,
        path=spec.path,
        num_rows=num_rows,
        is_exact=is_exact,
        num_checked=num_checked,
        num_templated=rows.num_counted,
        num_dropped=rows.num_dropped,
        longest=rows.longest,
    )


def _rows(spec: DatasetSpec, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows; behind one that cannot be read it goes on, a few times."""
    file, part = split_slice(spec.path)
    position, num_broken = part.start, 0
    while position < part.stop:
        rows = read_rows(f"{file}@[{position}:{part.stop}]")
        try:
            for row in rows:
                position += 1
                yield row
            return
        except DataError as error:
            problems.add(str(error))
            position, num_broken = position + 1, num_broken + 1
            if num_broken == MAX_BROKEN_ROWS:
                return


def count_rows(file: Path) -> tuple[int, bool]:
    """(rows of the file, whether that is exact): of a huge jsonl file only the beginning is read.

    Raises:
        DataError: an unknown suffix, or no parquet file.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]

        try:
            return int(parquet.read_metadata(file).num_rows), True  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        except ValueError as error:  # ArrowInvalid
            raise DataError(f"{file}: not a parquet file ({error})") from error
    if file.suffix != ".jsonl":
        next(islice(read_rows(str(file)), 1), None)  # it names what it can read
    size = file.stat().st_size
    num_rows = num_bytes = 0
    with file.open("rb") as lines:
        for line in lines:
            num_rows += not line.isspace()
            num_bytes += len(line)
            if num_bytes > MAX_COUNTED_BYTES:
                return num_rows * size // num_bytes, False
    return num_rows, True
