"""FolderTokenizer: chat template and token ids straight from a model folder, without transformers.

For checks that must be quick: transformers takes seconds to import, this a tenth of one. Text and
ids are those of transformers' fast tokenizers (tests/unit/data/test_templates.py compares them byte
for byte), with these differences:

- a folder whose tokenizer has code of its own, or no tokenizer.json, cannot be read here;
- tokens that only tokenizer_config.json adds, and settings by which a tokenizer class changes what
  tokenizer.json says, are not applied;
- templates get JSON schemas as tools, never Python functions.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slime.errors import CheckpointError

if TYPE_CHECKING:
    from jinja2 import Template

# Anything of these makes a folder one with a tokenizer, even if it cannot be read here.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
_DEFAULT = "default"
_TOOL_USE = "tool_use"


class FolderTokenizer:
    """The part of a Hugging Face tokenizer that turns rows into prompts.

    Args:
        folder: with tokenizer.json, and the template in chat_template.jinja or
            tokenizer_config.json.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._settings = _read_settings(self._folder)
        self._templates = _read_templates(self._folder, self._settings)
        self._compiled: dict[str, Template] = {}

    @property
    def has_template(self) -> bool:
        """Whether there is any chat template."""
        return bool(self._templates)

    @property
    def can_count(self) -> bool:
        """Whether `ids` has what it needs."""
        return (self._folder / "tokenizer.json").is_file()

    @property
    def has_own_code(self) -> bool:
        """Whether the tokenizer is code in the folder, which is not run here."""
        return "AutoTokenizer" in (self._settings.get("auto_map") or {})

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """The template's text for the messages.

        Raises:
            ValueError: there is no template, or several and none is the default.
            jinja2.TemplateError: the template is wrong or refuses the messages.
        """
        assert not tokenize
        name = self._template_name(has_tools=tools is not None)
        if name not in self._compiled:
            self._compiled[name] = _compile(self._templates[name])
        return self._compiled[name].render(
            messages=conversation,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **variables},
        )

    def ids(self, text: str) -> list[int]:
        """Ids of `text`, exactly as written: no BOS or EOS is added."""
        return self._core.encode(text, add_special_tokens=False).ids

    @cached_property
    def _core(self) -> Any:
        tokenizers: Any = import_module("tokenizers")  # untyped
        path = self._folder / "tokenizer.json"
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises Exception itself
            raise CheckpointError(f"cannot read {path}: {error}; copy the file again") from error
        core.no_truncation()
        core.no_padding()
        return core

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """`eos_token` and so on, as templates know them."""
        tokens = {name: self._settings.get(name) for name in _SPECIAL}
        texts = {name: _token_text(token) for name, token in tokens.items()}
        return {name: text for name, text in texts.items() if text is not None}

    def _template_name(self, *, has_tools: bool) -> str:
        # A single template that has a name is none: transformers wants to be told which.
        if has_tools and _TOOL_USE in self._templates:
            return _TOOL_USE
        if _DEFAULT in self._templates:
            return _DEFAULT
        found = f"only {', '.join(sorted(self._templates))}" if self._templates else "none"
        raise ValueError(
            f"{self._folder} has no default chat template (found {found}); put one into "
            "chat_template.jinja"
        )


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds a tokenizer of any kind."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # an old folder keeps them apart
        settings |= _read_json(folder / "special_tokens_map.json")
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; nothing without a file."""
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; copy the file again")
    return cast(dict[str, Any], content)


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text; files go before what tokenizer_config.json has."""
    templates: dict[str, str] = {}
    if (single := folder / "chat_template.jinja").is_file():
        templates[_DEFAULT] = single.read_text("utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text("utf-8")
    if templates:
        return templates
    given = settings.get("chat_template")
    if isinstance(given, str):
        return {_DEFAULT: given}
    if isinstance(given, list):
        rows = cast(list[dict[str, str]], given)
        return {row["name"]: row["template"] for row in rows}
    return cast(dict[str, str], given) if isinstance(given, dict) else {}


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):  # an AddedToken with its settings
        return cast(dict[str, str], token).get("content")
    return token if isinstance(token, str) else None


def _compile(text: str) -> "Template":
    """The template in the environment that chat templates are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote; for the text it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_same")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(text)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)
