"""Tokenizers and chat templates: messages in, text and ids out. Importable without torch."""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, cast

from slime.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

Message = dict[str, Any]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that slime uses."""

    eos_token: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_tokens: list[str]

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any: ...


@lru_cache(maxsize=8)
def load_tokenizer(path: str | None, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder; loaded once per process.

    Args:
        trust_remote_code: of no effect, for callers who know transformers' word: code in the folder
            is never run.

    Raises:
        CheckpointError: there is no tokenizer at `path`, or none without code of its own.
    """
    if trust_remote_code:
        return load_tokenizer(path)
    from transformers import AutoTokenizer  # several seconds, so only when one is needed

    if path is None:
        raise CheckpointError("no tokenizer: --hf-checkpoint must name a Hugging Face folder")
    try:
        return cast(Any, AutoTokenizer).from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises Exception itself
        raise CheckpointError(
            f"cannot load a tokenizer from {path} ({error}); --hf-checkpoint must be a folder of "
            "this machine with tokenizer.json and tokenizer_config.json. Code in a model folder is "
            "not run: a tokenizer that needs its own must be converted to tokenizer.json first."
        ) from error


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    where: str,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The chat template's text for `messages`.

    Args:
        where: names the row in error messages, e.g. "train.jsonl:12".
        template_kwargs: variables for the template, e.g. {"enable_thinking": False}.

    Raises:
        DataError: the tokenizer has no template, or the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except (
        *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise DataError(
            f"{where}: the chat template failed with {type(error).__name__}: {error}; the messages "
            f"have roles {[message.get('role') for message in messages]}"
        ) from error


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, exactly as written: no BOS or EOS is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; fast tokenizers spread one call over the cores."""
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def as_messages(value: Any, *, where: str) -> list[Message]:
    """A row's prompt as messages: a list of them, or a string as one user turn.

    Keys that are null are dropped, because parquet gives every message the union of all keys and
    templates ask whether a key is there. The content of a message that only calls tools becomes "".

    Raises:
        DataError: `value` is neither, or a message has no role or says nothing.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: the prompt must be a string or a list of messages, found {value!r:.80}"
        )
    messages: list[Message] = []
    for item in cast(list[Any], value):
        message: Message = without_nulls(item) if isinstance(item, dict) else {}
        if not isinstance(message.get("role"), str) or not message.keys() & {
            "content",
            "tool_calls",
        }:
            raise DataError(
                f'{where}: a message must look like {{"role": "user", "content": "..."}}, '
                f"found {item!r:.80}"
            )
        messages.append({"content": "", **message})
    return messages


def without_nulls(value: Any) -> Any:
    """`value` without the null entries of its dicts, at any depth."""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return {key: without_nulls(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in cast(list[Any], value)]
    return value
