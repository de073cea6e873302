from pathlib import Path
from typing import Any

import pytest
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.chat import load_tokenizer
from slime.data.sample import Sample
from slime.errors import ConfigError, DataError
from slime.rollout.sft_rollout import generate_rollout

Status = Sample.Status


class FakeConversations:
    """A data source that hands out what it was given."""

    def __init__(self, *prompts: Any) -> None:
        self.groups = [[Sample(index=i, prompt=prompt)] for i, prompt in enumerate(prompts)]

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return self.groups[:num_samples]

    def add_samples(self, samples: list[list[Sample]]) -> None: ...

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def __len__(self) -> int:
        return len(self.groups)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture
def args(tmp_path: Path) -> Any:
    return make_args("http://127.0.0.1:1", hf_checkpoint=make_char_tokenizer(tmp_path))


def test_response_is_the_tail_from_the_first_trained_token(args: Any):
    chat = [turn("user", "hi"), turn("assistant", "ab"), turn("user", "c"), turn("assistant", "d")]
    output = generate_rollout(args, 0, FakeConversations(chat, chat[:2]))
    tokenizer = load_tokenizer(args.hf_checkpoint)
    (long,), (short,) = output.samples
    assert isinstance(long, Sample)
    assert isinstance(short, Sample)
    assert short.response == "ab<|im_end|>\n"
    assert short.loss_mask == [1, 1, 1, 0]
    assert (short.reward, short.status) == (0.0, Status.COMPLETED)
    assert long.loss_mask is not None
    trained = [
        token
        for token, mask in zip(long.tokens[-long.response_length :], long.loss_mask, strict=True)
        if mask
    ]
    assert tokenizer.decode(trained) == "ab<|im_end|>d<|im_end|>"
    assert tokenizer.decode(long.tokens).startswith("<|im_start|>user\nhi<|im_end|>")
    long.validate()


def test_conversation_without_an_answer_is_left_out(args: Any):
    chat = [turn("user", "hi"), turn("assistant", "ab", step_loss_mask=0)]
    ((sample,),) = generate_rollout(args, 0, FakeConversations(chat)).samples
    assert isinstance(sample, Sample)
    assert (sample.status, sample.remove_sample) == (Status.FAILED, True)
    assert (sample.response_length, sample.loss_mask) == (0, [])


def test_text_is_refused(args: Any):
    with pytest.raises(DataError, match="SFT needs messages, found 'text'"):
        generate_rollout(args, 0, FakeConversations("text"))


def test_evaluation_is_refused(args: Any):
    with pytest.raises(ConfigError, match="--eval-function-path"):
        generate_rollout(args, 0, FakeConversations(), evaluation=True)
