import argparse
from pathlib import Path

import pytest
from support.live_rollout import FLAGS
from support.scripted_model import MODEL_ARGS, save_scripted_model

from slime.errors import ConfigError
from slime.utils.arguments import parse_args


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = save_scripted_model(tmp_path_factory.mktemp("model"), {})
    prompts = Path(model) / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "label": "b"}\n')
    return f"{MODEL_ARGS} {FLAGS} --hf-checkpoint {model} --prompt-data {prompts}".split()


def own(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--search-url", default="http://localhost")
    return parser


def test_flags_and_arguments_of_ones_own_are_in_one_namespace(words: list[str]):
    args = parse_args(own, [*words, "--search-url", "http://other"])
    assert args.search_url == "http://other"
    assert args.rollout_batch_size == 2
    assert args.num_layers == 1


def test_argv_is_that_of_the_process(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert parse_args().n_samples_per_prompt == 2


def test_flag_of_slime_cannot_be_taken(words: list[str]):
    def clash(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--lr", type=float)

    with pytest.raises(ConfigError, match="--lr: slime has a flag of that name"):
        parse_args(clash, words)


def test_unknown_flag_is_named(words: list[str]):
    with pytest.raises(ConfigError, match="--search-ulr"):
        parse_args(own, [*words, "--search-ulr", "x"])
