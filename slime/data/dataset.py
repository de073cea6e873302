"""Dataset: rows of a jsonl or parquet file as prompts, templated and tokenised once, at start."""

import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from slime.data.chat import (
    Message,
    Tokenizer,
    as_messages,
    batch_token_ids,
    render,
    without_nulls,
)
from slime.data.sample import Sample
from slime.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1024
_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What to read, and how a row becomes a prompt; fields as the flags of the same name.

    Attributes:
        path: .jsonl or .parquet, with an optional slice of rows `@[a:b]`, as in Python.
        label_key: None = no label. `metadata_key` and `tool_key` may be missing in the rows.
        multimodal_keys: not supported yet.
        max_prompt_len: tokens; longer prompts are dropped. None = keep all.
        metadata: added to the metadata of every row.
    """

    path: str
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    multimodal_keys: Mapping[str, str] | None = None
    apply_chat_template: bool = False
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_prompt_len: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: str | list[Message]
    label: Any
    metadata: dict[str, Any]


class Dataset:
    """The prompts of one file, in file order.

    Texts are tokenised once; `sample(i).tokens` holds the prompt ids, so nobody needs to do it
    again. The ids of all rows share one int32 array. Without a tokenizer, and for prompts that stay
    messages (SFT), `tokens` is empty and the length filter does not apply.

    Raises:
        DataError: a row does not parse, lacks a key, or does not fit the template (all with the
            row's number); or no row is left.
        ConfigError: `multimodal_keys` is set.
    """

    def __init__(self, spec: DatasetSpec, tokenizer: Tokenizer | None) -> None:
        if spec.multimodal_keys:
            raise ConfigError(
                "--multimodal-keys: images and video are not supported yet; remove the flag to "
                "train on the text alone"
            )
        self.spec = spec
        self.num_dropped = 0
        self._rows: list[_Row] = []
        self._token_ids = np.empty(0, np.int32)
        self._offsets = np.zeros(1, np.int64)
        self._load(tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        """A fresh Sample of row `index`; nothing in it is shared with another."""
        row = self._rows[index]
        begin, end = self._offsets[index], self._offsets[index + 1]
        return Sample(
            prompt=deepcopy(row.prompt),
            tokens=cast(list[int], self._token_ids[begin:end].tolist()),
            label=row.label,
            metadata=deepcopy(row.metadata),
            apply_chat_template_kwargs=dict(self.spec.apply_chat_template_kwargs),
        )

    def epoch_order(self, seed: int, epoch: int) -> list[int]:
        """Row numbers, shuffled; the same for the same seed and epoch on every machine."""
        order = list(range(len(self)))
        random.Random(seed + epoch).shuffle(order)
        return order

    def _load(self, tokenizer: Tokenizer | None) -> None:
        num_rows, chunks = 0, [np.empty(0, np.int32)]
        lengths = [0]
        rows = read_rows(self.spec.path)
        while batch := list(islice(rows, _BATCH_ROWS)):
            num_rows += len(batch)
            parsed = [self._parse(where, row, tokenizer) for where, row in batch]
            ids = _tokenize(tokenizer, [row.prompt for row in parsed])
            for (where, _), row, row_ids in zip(batch, parsed, ids, strict=True):
                _check_not_empty(where, row.prompt, row_ids, tokenizer)
                if self.spec.max_prompt_len is None or len(row_ids) <= self.spec.max_prompt_len:
                    self._rows.append(row)
                    chunks.append(np.asarray(row_ids, np.int32))
                    lengths.append(len(row_ids))
        self._token_ids = np.concatenate(chunks)
        self._offsets = np.cumsum(np.asarray(lengths, np.int64))
        self.num_dropped = num_rows - len(self)
        self._report(num_rows)

    def _parse(self, where: str, row: dict[str, Any], tokenizer: Tokenizer | None) -> _Row:
        spec = self.spec
        for key in (spec.input_key, spec.label_key):
            if key is not None and key not in row:
                raise DataError(f"{where}: no key {key!r}; the row has {sorted(row)}")
        metadata = _mapping(row.get(spec.metadata_key), where, spec.metadata_key)
        metadata |= spec.metadata
        tools = _json_value(row.get(spec.tool_key), where)
        if tools:
            metadata["tools"] = tools = without_nulls(tools)
        prompt = self._prompt(row[spec.input_key], tools, where, tokenizer)
        return _Row(prompt, row[spec.label_key] if spec.label_key else None, metadata)

    def _prompt(
        self, value: Any, tools: Any, where: str, tokenizer: Tokenizer | None
    ) -> str | list[Message]:
        if not self.spec.apply_chat_template:
            if not isinstance(value, str):
                return as_messages(value, where=where)
            _check_text(where, value)
            return value
        if tokenizer is None:
            raise ConfigError("--apply-chat-template needs the tokenizer of --hf-checkpoint")
        text = render(
            tokenizer,
            as_messages(value, where=where),
            where=where,
            tools=tools or None,
            template_kwargs=self.spec.apply_chat_template_kwargs,
        )
        _check_text(where, text)
        return text

    def _report(self, num_rows: int) -> None:
        name, limit = self.spec.path, self.spec.max_prompt_len
        if not self._rows:
            raise DataError(
                f"{name}: no prompts left of {num_rows} rows"
                + (f"; all are longer than {limit} tokens" if num_rows else "")
            )
        if self.num_dropped:
            logger.warning(
                "%s: dropped %d of %d prompts longer than %s tokens",
                name,
                self.num_dropped,
                num_rows,
                limit,
            )
        longest = int(np.diff(self._offsets).max())
        logger.info("%s: %d prompts, the longest has %d tokens", name, len(self), longest)


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:number", row) for each row of a jsonl (lines from 1) or parquet file (rows from 0).

    Args:
        path: with an optional `@[a:b]`; jsonl counts the lines that are not blank.

    Raises:
        DataError: no such file, an unknown suffix, or a line that is no JSON object.
    """
    file, rows = split_slice(path)
    if not file.is_file():
        raise DataError(f"{'a folder, not a file' if file.is_dir() else 'no such file'}: {file}")
    if file.suffix == ".jsonl":
        return _readable(file, _read_jsonl(file, rows))
    if file.suffix == ".parquet":
        return _readable(file, _read_parquet(file, rows))
    raise DataError(f"{file}: prompts must be .jsonl or .parquet, found {file.suffix!r}")


def split_slice(path: str) -> tuple[Path, slice]:
    """`"a.jsonl@[10:20]"` -> (a.jsonl, slice(10, 20)); without a suffix the slice takes all."""
    if not (match := _SLICE.fullmatch(path)):
        return Path(path), slice(None)
    start, stop = (int(text) if text else None for text in match.group("start", "stop"))
    return Path(match["path"]), slice(start, stop)


def _readable(
    file: Path, rows: Iterator[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`rows`; what the file system says, and a parquet file damaged in the middle, as DataErrors."""
    try:
        yield from rows
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"cannot read {file}: {error}; is the file whole?") from error


def _read_jsonl(file: Path, rows: slice) -> Iterator[tuple[str, dict[str, Any]]]:
    start, stop = rows.start, rows.stop
    if (start or 0) < 0 or (stop or 0) < 0:  # only then is the end needed first
        with file.open("rb") as lines:
            start, stop, _ = rows.indices(sum(not line.isspace() for line in lines))
    with file.open("rb") as lines:
        filled = ((i, line) for i, line in enumerate(lines, start=1) if not line.isspace())
        for number, line in islice(filled, start, stop):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}): {line[:80]!r}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be a JSON object, found {line[:80]!r}")
            yield where, cast(dict[str, Any], row)


def _read_parquet(file: Path, rows: slice) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet: Any = import_module("pyarrow.parquet")  # untyped

    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:  # ArrowInvalid
        raise DataError(f"{file}: not a parquet file ({error})") from error
    start, stop, _ = rows.indices(table.metadata.num_rows)
    first = 0
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if first + num_rows <= start or first >= stop:
            first += num_rows
            continue
        # Group by group: one call for all keeps the whole file in memory as it goes.
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
            begin, end = max(start - first, 0), min(stop - first, batch.num_rows)
            if begin < end:
                values = batch.slice(begin, end - begin).to_pylist()
                for number, row in enumerate(values, start=first + begin):
                    yield f"{file}:{number}", row
            first += batch.num_rows


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the prompt is no text that UTF-8 can hold ({error.reason} at character "
            f"{error.start}); half an emoji as \\ud83d was probably cut from its other half"
        ) from error


def _check_not_empty(
    where: str, prompt: str | list[Message], ids: list[int], tokenizer: Tokenizer | None
) -> None:
    """An engine cannot answer nothing: better to stop here than to fail the sample in every epoch."""
    if isinstance(prompt, str) and not (ids if tokenizer is not None else prompt):
        raise DataError(f"{where}: the prompt {prompt!r:.80} has no tokens; take the row out")


def _tokenize(
    tokenizer: Tokenizer | None, prompts: Sequence[str | list[Message]]
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if tokenizer is None:
        return [[] for _ in prompts]
    ids = iter(batch_token_ids(tokenizer, texts))
    return [next(ids) if isinstance(prompt, str) else [] for prompt in prompts]


def _json_value(value: Any, where: str) -> Any:
    """`value`, parsed if it is a JSON text (parquet files often hold nested columns so)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, found {value!r:.80}") from error


def _mapping(value: Any, where: str, key: str) -> dict[str, Any]:
    value = _json_value(value or {}, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: {key} must be an object, found {value!r:.80}")
    return dict(cast(dict[str, Any], value))
