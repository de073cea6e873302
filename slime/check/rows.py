"""RowCheck: rows of a file, one after the other; each kind of mistake is told once, with its row."""

import json
import logging
from collections.abc import Mapping
from typing import Any, cast

from slime.config.problems import Problems
from slime.data.chat import Tokenizer, as_messages, render, without_nulls
from slime.data.dataset import DatasetSpec
from slime.data.templates import FolderTokenizer
from slime.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

# Templating and counting is the slow part: enough rows to meet each shape of row, no more.
MAX_TEMPLATED = 256
MAX_TEMPLATED_CHARS = 100_000


class RowCheck:
    """What the rows of one file are like.

    Args:
        spec: the file and how its rows become prompts.
        tokenizer: None = nothing is templated or counted.
        context: most tokens an engine takes; None = no engine reads these prompts.
        is_sft: rows are whole conversations, which are templated later and never dropped.

    Attributes:
        num_counted, num_dropped, longest: as in DataFacts.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        tokenizer: FolderTokenizer | None,
        *,
        context: int | None,
        is_sft: bool,
    ) -> None:
        self.num_counted = 0
        self.num_dropped = 0
        self.longest: int | None = None
        self._spec = spec
        self._tokenizer = tokenizer
        self._context = context
        self._is_sft = is_sft
        self._chars = 0
        self._first: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def check(self, where: str, row: Mapping[str, Any]) -> None:
        """Look at the next row."""
        spec = self._spec
        for key in (spec.input_key, spec.label_key):
            if key is not None and key not in row:
                self._wrong(f"key {key}", f"{where}: no key {key!r}; the row has {sorted(row)}")
                if key == spec.input_key:
                    return
        self._check_metadata(where, row.get(spec.metadata_key))
        try:
            tools = _json(row.get(spec.tool_key), where)
            text = self._text(where, row[spec.input_key], without_nulls(tools))
        except DataError as error:
            kind = "template" if "template failed" in str(error) else "prompt"
            self._wrong(kind, str(error))
            return
        if text is not None:
            self._count(where, text)

    def finish(self, problems: Problems, *, all_rows: bool) -> None:
        """Note what was wrong, each kind with its first row and how many rows have it."""
        for kind, message in self._first.items():
            more = self._times[kind] - 1
            problems.add(message + (f" (and {more} more of the rows checked)" if more else ""))
        if not self.num_dropped:
            return
        if self.num_counted > self.num_dropped:
            logger.warning(
                "%s: %d of the first %d prompts are longer than %s tokens, and a run drops those",
                self._spec.path,
                self.num_dropped,
                self.num_counted,
                self._spec.max_prompt_len,
            )
        elif all_rows and not self._first:
            problems.add(
                f"{self._spec.path}: no prompts left of {self.num_counted} rows; all are longer "
                f"than {self._spec.max_prompt_len} tokens: raise --rollout-max-prompt-len or "
                "--rollout-max-context-len"
            )

    def _check_metadata(self, where: str, value: Any) -> None:
        key = self._spec.metadata_key
        try:
            found = _json(value or {}, where)
        except DataError as error:
            self._wrong(f"metadata {key}", str(error))
            return
        if not isinstance(found, dict):
            self._wrong(f"metadata {key}", f"{where}: {key} must be an object, found {found!r:.80}")

    def _text(self, where: str, value: Any, tools: Any) -> str | None:
        """The prompt as text; None when nobody asks for one yet.

        Raises:
            DataError: it is no prompt, or the template does not take it.
        """
        spec = self._spec
        if self._is_sft:
            self._refuse_sft_text(where, value)
        elif isinstance(value, str) and not spec.apply_chat_template:
            return value
        messages = as_messages(value, where=where)
        if self._tokenizer is None or self._is_enough():
            return None
        return render(
            cast(Tokenizer, self._tokenizer),
            messages,
            where=where,
            tools=tools or None,
            add_generation_prompt=not self._is_sft,
            template_kwargs=spec.apply_chat_template_kwargs,
        )

    def _refuse_sft_text(self, where: str, value: Any) -> None:
        if self._spec.apply_chat_template or isinstance(value, str):
            raise DataError(
                f"{where}: SFT needs messages, found {value!r:.60}; name their column with "
                "--input-key and leave --apply-chat-template out"
            )

    def _is_enough(self) -> bool:
        return self.num_counted >= MAX_TEMPLATED or self._chars >= MAX_TEMPLATED_CHARS

    def _count(self, where: str, text: str) -> None:
        if self._tokenizer is None or self._is_enough():
            return
        self._chars += len(text)
        if not self._tokenizer.can_count:
            return
        try:
            length = len(self._tokenizer.ids(text))
        except CheckpointError as error:
            self._tokenizer = None
            self._wrong("tokenizer", f"--hf-checkpoint: {error}")
            return
        self.num_counted += 1
        limit = self._spec.max_prompt_len
        if limit is not None and length > limit and not self._is_sft:
            self.num_dropped += 1
            return
        self.longest = max(self.longest or 0, length)
        if self._context is not None and length > self._context and not self._is_sft:
            self._wrong(
                "context",
                f"{where}: the prompt has {length} tokens, more than the engines' context of "
                f"{self._context}; leave such prompts out with --rollout-max-prompt-len "
                f"{self._context - 1}, or raise --sglang-context-length if the model allows it",
            )

    def _wrong(self, kind: str, message: str) -> None:
        self._first.setdefault(kind, message)
        self._times[kind] = self._times.get(kind, 0) + 1


def _json(value: Any, where: str) -> Any:
    """`value`, parsed if it is a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: expected JSON, found {value!r:.80}") from error
