from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import chat_templates
from support.tiny_tokenizer import CHATML_TEMPLATE, make_char_tokenizer

from slime.data.chat import Message, load_tokenizer
from slime.data.loss_mask import LossMaskType, MultiTurnLossMaskGenerator
from slime.errors import DataError

Make = Callable[..., MultiTurnLossMaskGenerator]

TEMPLATES = {
    "qwen": CHATML_TEMPLATE,
    "qwen3": chat_templates.QWEN3,
    "qwen3_5": chat_templates.QWEN3_5,
    "distill_qwen": chat_templates.DISTILL,
    "rewriting": chat_templates.REWRITING,
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, template in TEMPLATES.items():
        make_char_tokenizer(root / name, chat_template=template)

    def generator(kind: LossMaskType, template: str | None = None, **kwargs: Any) -> Any:
        tokenizer = load_tokenizer(str(root / (template or kind)))
        return MultiTurnLossMaskGenerator(tokenizer, kind, kwargs)

    return generator


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> Message:
    return {"role": "assistant", "content": text, **keys}


def tool(text: str) -> Message:
    return {"role": "tool", "content": text}


def trained(generator: MultiTurnLossMaskGenerator, messages: list[Message]) -> list[str]:
    ids, mask = generator.get_loss_mask(messages)
    assert len(ids) == len(mask)
    return generator.get_text_from_loss_mask(ids, mask)


def text(generator: MultiTurnLossMaskGenerator, messages: list[Message]) -> str:
    return generator.tokenizer.decode(generator.get_loss_mask(messages)[0])


CONVERSATION = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]


def test_answers_train_with_their_end_token_and_nothing_else(make: Make) -> None:
    generator = make("qwen")
    assert trained(generator, CONVERSATION) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert text(generator, CONVERSATION) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
    )


words = st.text(st.sampled_from("ab \n.<>"), min_size=1, max_size=6)
roles = st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=6)


@settings(deadline=None)
@given(first=words, roles=roles, data=st.data())
def test_an_append_only_template_is_reproduced_to_the_letter(
    make: Make, first: str, roles: list[str], data: st.DataObject
) -> None:
    generator = make("qwen")
    messages = [user(first), *({"role": r, "content": data.draw(words)} for r in roles)]
    render: Any = generator.tokenizer.apply_chat_template
    ids, mask = generator.get_loss_mask(messages)
    assert generator.tokenizer.decode(ids) == render(messages, tokenize=False)
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert generator.get_text_from_loss_mask(ids, mask) == answers


def test_a_step_loss_mask_of_zero_changes_the_mask_but_no_token(make: Make) -> None:
    generator = make("qwen")
    silent = [user("q1"), assistant("a1", step_loss_mask=0), user("q2"), assistant("a2")]
    assert trained(generator, silent) == ["a2<|im_end|>"]
    assert generator.get_loss_mask(silent)[0] == generator.get_loss_mask(CONVERSATION)[0]


def test_response_length_counts_from_the_first_trained_token(make: Make) -> None:
    lengths = make("qwen").get_response_lengths([[0, 0, 1, 0, 1], [0, 0], [1]])
    assert lengths == [3, 0, 1]


def test_tools_are_in_the_head_once(make: Make) -> None:
    generator = make("qwen3")
    ids, mask = generator.get_loss_mask(CONVERSATION, tools=[{"name": "f"}])
    rendered = generator.tokenizer.decode(ids)
    assert rendered.startswith('<|im_start|>system\n{"name": "f"}<|im_end|>\n<|im_start|>user\nq1')
    assert rendered.count("system") == 1
    assert len(generator.get_text_from_loss_mask(ids, mask)) == 2


def test_qwen3_keeps_the_thinking_of_every_turn(make: Make) -> None:
    messages = [user("q1"), assistant("<think>\nt1\n</think>\n\na1"), user("q2"), assistant("a2")]
    assert trained(make("qwen3"), messages) == [
        "<think>\nt1\n</think>\n\na1<|im_end|>",
        "<think>\n\n</think>\n\na2<|im_end|>",
    ]


def test_qwen_refuses_a_template_that_drops_thinking(make: Make) -> None:
    messages = [user("q1"), assistant("<think>\nt1\n</think>\n\na1"), user("q2"), assistant("a2")]
    with pytest.raises(DataError, match=r"does not only append.*qwen3 allows"):
        make("qwen", "qwen3").get_loss_mask(messages)


def test_neighbouring_tool_messages_stay_in_one_block(make: Make) -> None:
    generator = make("qwen3")
    call = assistant("<think>\nt\n</think>\n\n", tool_calls=[{"name": "f"}])
    messages = [user("q"), call, tool("r1"), tool("r2"), assistant("<think>\nu\n</think>\n\na")]
    assert trained(generator, messages) == [
        "<think>\nt\n</think>\n\n<tool_call>\nf\n</tool_call><|im_end|>",
        "<think>\nu\n</think>\n\na<|im_end|>",
    ]
    render: Any = generator.tokenizer.apply_chat_template
    assert text(generator, messages) == render(messages, tokenize=False)


def test_an_opening_that_the_prompt_writes_does_not_train(make: Make) -> None:
    messages = [user("q1"), assistant("<think>\nt1\n</think>\n\na1"), user("q2"), assistant("a2")]
    assert trained(make("qwen3_5"), messages) == [
        "t1\n</think>\n\na1<|im_end|>",
        "\n</think>\n\na2<|im_end|>",
    ]
    quiet = make("qwen3", enable_thinking=False)
    assert trained(quiet, [user("q"), assistant("a")]) == ["a<|im_end|>"]


def test_thinking_where_the_prompt_forbids_it_is_refused(make: Make) -> None:
    quiet = make("qwen3", enable_thinking=False)
    with pytest.raises(DataError, match="does not fit this chat template or answer"):
        quiet.get_loss_mask([user("q"), assistant("<think>\nt\n</think>\n\na")])


def test_distill_answers_are_written_as_they_stand(make: Make) -> None:
    generator = make("distill_qwen")
    thought = "t\n</think>\n\na1"
    for content in (thought, f"<think>\n{thought}"):
        messages = [user("q1"), assistant(content), user("q2"), assistant("a2")]
        assert trained(generator, messages) == [f"{thought}<|im_end|>", "a2<|im_end|>"]
        assert text(generator, messages) == (
            f"<|User|>q1<|Assistant|><think>\n{thought}<|im_end|><|User|>q2<|Assistant|>a2<|im_end|>"
        )


def test_distill_refuses_tool_calls(make: Make) -> None:
    with pytest.raises(DataError, match="tool calls"):
        make("distill_qwen").get_loss_mask([user("q"), assistant("a", tool_calls=[{"name": "f"}])])


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_a_template_that_rewrites_its_beginning_is_refused(make: Make, kind: LossMaskType) -> None:
    with pytest.raises(DataError, match="--loss-mask-type"):
        make(kind, "rewriting").get_loss_mask(CONVERSATION)


def test_a_conversation_that_begins_with_the_assistant_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="must begin with"):
        make("qwen").get_loss_mask([assistant("a")])


def test_a_conversation_without_answers_trains_nothing(make: Make) -> None:
    ids, mask = make("qwen").get_loss_mask([user("q")])
    assert set(mask) == {0}
    assert len(ids) == len(mask)
