"""An agent's session for tests: a tokenizer, a FakeEngine that writes what a test says, the endpoint."""

import argparse
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fake_engine import FakeEngine, Payload, Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.agent.session import Session, agent_session
from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.rollout.state import GenerateState

END = "<|im_end|>"
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
# As chat templates and chat completions have it.
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS, "strict": True},
}
# Renders calls too, as Qwen's does.
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@dataclass
class World:
    """One session, and what is behind it."""

    args: argparse.Namespace
    engine: FakeEngine
    session: Session
    sample: Sample
    tokenizer: Any

    @property
    def state(self) -> GenerateState:
        return GenerateState(self.args)

    def prompts(self) -> list[str]:
        """What the engine was asked, as text."""
        return [self.tokenizer.decode(request["input_ids"]) for request in self.engine.requests]


def make_sample(**more: Any) -> Sample:
    return Sample(group_index=0, index=7, prompt="unused", tokens=[5, 6], session_id="key", **more)


@asynccontextmanager
async def agent_world(
    folder: Path,
    replies: Sequence[str | Reply] | Callable[[Payload, int], str | Reply],
    *,
    evaluation: bool = False,
    sample: Sample | None = None,
    params: dict[str, Any] | None = None,
    **overrides: Any,
) -> AsyncIterator[World]:
    """A session whose engine writes `replies`, in order; texts are tokenised as they stand."""
    make_char_tokenizer(folder, chat_template=TEMPLATE)
    tokenizer: Any = load_tokenizer(str(folder))

    def on_generate(payload: Payload, number: int) -> Reply:
        reply = replies(payload, number) if callable(replies) else replies[number]
        if isinstance(reply, Reply):
            return reply
        return Reply(ids=tuple(tokenizer(reply, add_special_tokens=False)["input_ids"]))

    async with fake_engine(on_generate) as engine:
        limits = {"rollout_max_response_len": 4096} | overrides
        args = make_args(engine.url, hf_checkpoint=str(folder), **limits)
        own = sample or make_sample()
        sampling = GenerateState(args).sampling_params | (params or {})
        async with agent_session(args, own, sampling, evaluation=evaluation) as session:
            yield World(args, engine, session, own, tokenizer)


def checked(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, each of which must be whole."""
    for sample in samples:
        sample.validate(vocab_size=200)
        assert sample.rollout_log_probs is not None
        assert len(sample.loss_mask or [1] * sample.response_length) == sample.response_length
    return list(samples)


def trained_text(sample: Sample, tokenizer: Any) -> str:
    """What trains, as text."""
    response = sample.tokens[sample.prompt_length :]
    mask = sample.loss_mask or [1] * len(response)
    return tokenizer.decode([i for i, trains in zip(response, mask, strict=True) if trains])
