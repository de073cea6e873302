"""Text of answers, and the search for stop strings while they are written."""

from collections.abc import Sequence
from typing import Any

from slime.engines.protocol import Json, SamplingParams


class Detokenizer:
    """Ids to text and back, with the tokenizer of the model's folder.

    Args:
        tokenizer: of transformers. Its Rust core is called directly where possible: the engine
            thread and the HTTP thread both use it, and transformers' `encode` changes its state.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        core = getattr(tokenizer, "backend_tokenizer", None)
        self._core = None if getattr(tokenizer, "clean_up_tokenization_spaces", False) else core

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, special tokens added as the tokenizer is configured."""
        if self._core is not None:
            return self._core.encode(text, add_special_tokens=True).ids
        return self._tokenizer.encode(text)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between: bool = True
    ) -> str:
        """Text of some ids; `spaces_between` matters for slow tokenizers only."""
        if self._core is not None:
            return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between,
        )

    def answer_text(self, ids: Sequence[int], params: SamplingParams, finish: Json | None) -> str:
        """Text of an answer; what ended it is cut off unless `no_stop_trim`.

        A stop token is dropped from the text and a stop string ends it, as in SGLang; ids are
        never trimmed.
        """
        matched = None if finish is None or params.no_stop_trim else finish.get("matched")
        if isinstance(matched, int) and ids:
            ids = ids[:-1]
        text = self.decode(
            ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between=params.spaces_between_special_tokens,
        )
        if isinstance(matched, str):
            text = text.partition(matched)[0]
        return text


class StopStrings:
    """Looks for stop strings in an answer, token by token.

    Text is decoded incrementally: a window of recent ids with and without the new ones; the
    difference is new text, unless it ends inside a character. Special tokens are visible here, so
    that one of them can be a stop string.

    Source: the two-offset scheme of vLLM and SGLang's incremental detokenizers.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._overlap = max(map(len, stops)) - 1
        self._ids: list[int] = []
        self._window = 0
        self._read = 0
        self._text = ""

    def push(self, token: int) -> str | None:
        """The first stop string in the text once `token` is added, or None."""
        self._ids.append(token)
        before = self._decode(self._window, self._read)
        after = self._decode(self._window, len(self._ids))
        if len(after) <= len(before) or after.endswith("�"):
            return None
        start = max(0, len(self._text) - self._overlap)
        self._text += after[len(before) :]
        self._window, self._read = self._read, len(self._ids)
        found = [(at, stop) for stop in self._stops if (at := self._text.find(stop, start)) >= 0]
        return min(found)[1] if found else None

    def _decode(self, start: int, end: int) -> str:
        return self._detokenizer.decode(self._ids[start:end], skip_special_tokens=False)
