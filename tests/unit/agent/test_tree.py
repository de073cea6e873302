"""Random agents on the tree of exchanges: every prompt is the chat template's, in the ids that were written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agent_world import ADD, END, TEMPLATE, TOOL
from support.chat_templates import REWRITING
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.agent.answering import read_text
from slime.agent.asked import Ask, assistant_message
from slime.agent.samples import samples_of
from slime.agent.tree import Exchange, Tree
from slime.data.chat import Message, load_tokenizer, render, token_ids
from slime.data.sample import Sample

ARGS = make_args("http://127.0.0.1:1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(make_char_tokenizer(folder, chat_template=TEMPLATE))


@dataclass
class Agent:
    """Talks, goes back, forgets and rewrites, as hypothesis says; `written` is what it got, in order."""

    tokenizer: Any
    tools: list[Any] | None
    tree: Tree = field(init=False)
    # Conversations it may go on with; each message with the exchange whose answer it is, if it still is.
    known: list[list[tuple[Message, Exchange | None]]] = field(default_factory=list[Any])

    def __post_init__(self) -> None:
        self.tree = Tree(self.tokenizer, template_kwargs={}, where="test")

    def ask(self, history: list[tuple[Message, Exchange | None]], words: str, ended: str) -> None:
        """One request, whose answer is `words`."""
        messages = [message for message, _ in history]
        exchange = self.tree.place(messages, self.tools)
        assert exchange.prompt == self.expected(history), self.tokenizer.decode(exchange.prompt)
        number = len(self.tree.exchanges)
        ids = token_ids(self.tokenizer, f"{number}:{words}{ended}")
        exchange.answer = Sample(tokens=list(exchange.prompt), status=Sample.Status.COMPLETED)
        log_probs = [-(number + i / 1000) for i in range(1, len(ids) + 1)]
        meta = {"weight_version": str(number)}
        exchange.answer.append_response_tokens(
            ARGS, tokens=ids, log_probs=log_probs, meta_info=meta
        )
        text = read_text(
            self.tokenizer, exchange.answer, Ask(model="", messages=[], tools=self.tools)
        )
        exchange.message = assistant_message(text.content, text.calls)
        self.tree.add(exchange)
        self.known.append([*history, (exchange.message, exchange)])

    def expected(self, history: list[tuple[Message, Exchange | None]]) -> list[int]:
        """Ids of the conversation, rendered as a whole, with each answer's own in its place."""
        shown = [
            message if exchange is None else {"role": "assistant", "content": f"ANSWER{i}."}
            for i, (message, exchange) in enumerate(history)
        ]
        text = render(self.tokenizer, shown, where="test", tools=self.tools)
        ids: list[int] = []
        for i, (_, exchange) in enumerate(history):
            if exchange is None:
                continue
            before, _, text = text.partition(f"ANSWER{i}.")
            written = exchange.answer.tokens
            ids += token_ids(self.tokenizer, before) + written
            if self.tokenizer.decode(written).endswith(END):
                assert text.startswith(END)
                text = text.removeprefix(END)
        return ids + token_ids(self.tokenizer, text)


WORDS = st.sampled_from(
    ["yes", " yes ", "a\nb", "", ADD, f"Hm. {ADD}\n{ADD}", "<tool_call>no", "<think>"]
)
SAID = st.sampled_from(["user", "tool", "system"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_prompts_are_rendered_and_answers_kept(tokenizer: Any, data: st.DataObject):
    agent = Agent(tokenizer, [TOOL] if data.draw(st.booleans()) else None)
    for _ in range(data.draw(st.integers(1, 8))):
        history = list(data.draw(st.sampled_from([[], *agent.known])))
        if history and data.draw(st.booleans()):
            history = _changed(history, data)
        role = data.draw(SAID) if history else "user"
        said: Message = {"role": role, "content": data.draw(WORDS)}
        history = [*history, *([(said, None)] * data.draw(st.integers(1, 2)))]
        agent.ask(history, data.draw(WORDS), data.draw(st.sampled_from([END, END, ""])))
    _check_samples(agent)


def _changed(history: list[Any], data: st.DataObject) -> list[Any]:
    """What agents do to what came before; a conversation that was changed is no longer ours there."""
    place = data.draw(st.integers(0, len(history) - 1))
    message, exchange = history[place]
    kind = data.draw(st.sampled_from(["space", "words", "shorter"]))
    if kind == "shorter":
        return history[: place + 1]
    if kind == "space" and exchange is not None:  # still the same answer
        spaced = message | {"content": message["content"].strip() + " "}
        return [*history[:place], (spaced, exchange), *history[place + 1 :]]
    changed = message | {"content": message["content"] + " (changed)"}
    after = [(message, None) for message, _ in history[place + 1 :]]
    return [*history[:place], (changed, None), *after]


def _check_samples(agent: Agent) -> None:
    """Each answer trains once, with its own log-probs and version; all else does not."""
    sample = Sample(index=3, group_index=1, prompt="row", label="5")
    samples = samples_of(ARGS, agent.tokenizer, agent.tree, sample)
    leaves = agent.tree.leaves()
    assert samples[0] is sample
    assert len(samples) == len(leaves)
    assert len({part.rollout_id for part in samples}) == 1
    trained: list[tuple[float, int]] = []
    for part, leaf in zip(samples, leaves, strict=True):
        part.validate()
        assert part.tokens == leaf.ids()
        assert agent.tokenizer.decode(part.tokens[part.prompt_length :]) == part.response
        mask = part.loss_mask or [1] * part.response_length
        ids = part.tokens[part.prompt_length :]
        for i, (token, trains, log_prob) in enumerate(
            zip(ids, mask, part.rollout_log_probs or [], strict=True)
        ):
            assert trains == (log_prob != 0.0)
            if trains:
                trained.append((log_prob, token))
                version = [version for first, version in part.version_spans if first <= i][-1]
                assert int(version) == int(-log_prob)
    expected = [
        pair
        for exchange in agent.tree.exchanges
        for pair in zip(
            exchange.answer.rollout_log_probs or [],
            exchange.answer.tokens,
            strict=True,
        )
    ]
    assert sorted(trained) == sorted(expected)
    versions = [version for part in samples for version in part.weight_versions]
    assert sorted(versions) == sorted(str(i) for i in range(len(agent.tree.exchanges)))


def test_the_call_ids_tell_two_answers_of_the_same_words_apart(tokenizer: Any):
    tree = Tree(tokenizer, template_kwargs={}, where="test")
    asked: list[Message] = [{"role": "user", "content": "?"}]
    answers = [[10, 11, 12], [10, 11, 13]]
    made: list[Exchange] = []
    for number, ids in enumerate(answers):
        exchange = tree.place(asked, [TOOL])
        exchange.answer = Sample(tokens=exchange.prompt + ids, response_length=3)
        call = {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": "f", "arguments": {}},
        }
        exchange.message = {"role": "assistant", "content": "", "tool_calls": [call]}
        tree.add(exchange)
        made.append(exchange)
    for exchange in made:
        told = [*asked, exchange.message, {"role": "tool", "content": "1"}]
        assert tree.place(told, [TOOL]).parent is exchange
    renamed = [*asked, {**made[0].message, "tool_calls": [{**call, "id": "mine"}]}]
    assert tree.place([*renamed, {"role": "tool", "content": "1"}], [TOOL]).parent is made[1]
    # Other tools are another prompt.
    assert tree.place([*renamed, {"role": "tool", "content": "1"}], None).parent is None


def test_a_template_that_cannot_be_continued_is_rendered_as_a_whole(tmp_path: Path):
    other = load_tokenizer(make_char_tokenizer(tmp_path, chat_template=REWRITING))
    agent = Agent(other, None)
    agent.ask([({"role": "user", "content": "a"}, None)], "yes", END)
    history = [(message, None) for message, _ in agent.known[0]]
    agent.ask([*history, ({"role": "user", "content": "b"}, None)], "no", END)
    assert agent.tree.num_rendered == 2
    assert [exchange.parent for exchange in agent.tree.exchanges] == [None, None]
