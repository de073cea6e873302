"""The table of bad input: each ends in one clear message, or in one failed sample.

Here stand the cases that cross rooms. Those of one room are beside it:
unknown and wrong flags, YAML      tests/unit/cli/test_parse.py, tests/unit/config/
rewards that fail, hang, lie       tests/unit/rollout/rm_hub/test_async_rm.py
plugins that cannot be imported    tests/unit/test_plugins.py
generate functions that hang       tests/unit/rollout/test_groups.py
checkpoints damaged, of another
  shape, and a full disk           tests/unit/backends/megatron/test_checkpoint_damage.py
two runs in one folder             tests/unit/observability/test_runs.py
ports in use, keys                 tests/contracts/test_security.py
"""

import json
import math
import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
from support.config_argv import base_argv
from support.fake_engine import Reply, fake_engine
from support.rollout_world import make_args
from support.tiny_tokenizer import make_char_tokenizer

from slime.checkpoint.hf import HfFolder
from slime.cli.parse import load_config
from slime.data.chat import load_tokenizer
from slime.data.data_source import RolloutDataSource, state_path
from slime.data.dataset import Dataset, DatasetSpec
from slime.data.sample import Sample
from slime.data.state import write_json
from slime.errors import CheckpointError, ConfigError, DataError, EngineError, SlimeError
from slime.observability.trackers import JsonlTracker, read_metrics
from slime.rollout.groups import generate_and_rm, generate_and_rm_group, raise_if_all_failed
from slime.rollout.state import GenerateState

Status = Sample.Status


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_char_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- prompts: a file is wrong -> the row and what to do, before anything starts ---

ROW = b'{"input": "1+1=", "label": "2"}\n'
BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "no prompts left of 0 rows"),
    "blank lines only": ("a.jsonl", b"\n \n\r\n", "no prompts left of 0 rows"),
    "malformed line": ("a.jsonl", ROW + b'{"input": \n', r"a\.jsonl:2: not JSON"),
    "malformed after blanks": ("a.jsonl", ROW + b"\n\n{\n", r"a\.jsonl:4: not JSON"),
    "two objects in a line": ("a.jsonl", ROW.strip() + ROW, r"a\.jsonl:1: not JSON"),
    "a list": ("a.jsonl", b'["1+1="]\n', "a row must be a JSON object"),
    "one JSON array": ("a.jsonl", b"[" + ROW.strip() + b"]\n", "a row must be a JSON object"),
    "not UTF-8": ("a.jsonl", ROW + b'{"input": "caf\xe9"}\n', r"a\.jsonl:2: not JSON .*utf-8"),
    "UTF-16": ("a.jsonl", ROW.decode().encode("utf-16"), r"a\.jsonl:\d+: not JSON"),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0", r"a\.jsonl:1: not JSON"),
    "deep nesting": ("a.jsonl", b'{"input": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: not JSON"),
    "huge number": ("a.jsonl", b'{"input": ' + b"9" * 9999 + b"}\n", r"a\.jsonl:1: not JSON"),
    "missing column": ("a.jsonl", b'{"prompt": "1+1="}\n', r"no key 'input'; the row has \['prom"),
    "number for text": ("a.jsonl", b'{"input": 7}\n', "must be a string or a list of messages"),
    "null for text": ("a.jsonl", b'{"input": null}\n', "must be a string or a list of messages"),
    "no messages": ("a.jsonl", b'{"input": []}\n', "must be a string or a list of messages"),
    "no role": ("a.jsonl", b'{"input": [{"content": "x"}]}\n', "a message must look like"),
    "empty prompt": ("a.jsonl", b'{"input": ""}\n', r"a\.jsonl:1: the prompt '' has no tokens"),
    "half an emoji": ("a.jsonl", b'{"input": "x\\ud83d"}\n', r"a\.jsonl:1: .*UTF-8 can hold"),
    "metadata a list": ("a.jsonl", b'{"input": "x", "metadata": [1]}\n', "must be an object"),
    "metadata no JSON": ("a.jsonl", b'{"input": "x", "metadata": "{"}\n', "expected JSON"),
    "no parquet": ("a.parquet", ROW, "not a parquet file"),
    "empty parquet": ("a.parquet", b"", "not a parquet file"),
    "another kind": ("a.csv", b"input\n1+1=\n", "must be .jsonl or .parquet"),
}


def dataset(path: Path, tokenizer_folder: str, **spec: Any) -> Dataset:
    return Dataset(DatasetSpec(path=str(path), **spec), load_tokenizer(tokenizer_folder))


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_prompt_file(case: str, tmp_path: Path, tokenizer_folder: str) -> None:
    name, content, message = BROKEN_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        dataset(path, tokenizer_folder)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600  # a huge line is not shown whole


GOOD_FILES = {
    "byte order mark": b"\xef\xbb\xbf" + ROW,
    "Windows line ends": ROW.replace(b"\n", b"\r\n") + b"\r\n",
    "no line end": ROW.strip(),
    "huge line": b'{"input": "1+1=", "label": "2", "more": "' + b"x" * 5_000_000 + b'"}\n',
    "line separator in a text": b'{"input": "1+1=", "label": "\xe2\x80\xa8"}\n',
}


@pytest.mark.parametrize("case", GOOD_FILES)
def test_what_is_unusual_but_right_is_read(
    case: str, tmp_path: Path, tokenizer_folder: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_FILES[case])
    data = dataset(path, tokenizer_folder)
    assert len(data) == 1
    assert data.sample(0).prompt == "1+1="


def test_a_parquet_file_cut_or_damaged_in_the_middle(tmp_path: Path, tokenizer_folder: str) -> None:
    path = tmp_path / "a.parquet"
    rows = [f"{i}+{i}=" for i in range(5000)]
    pyarrow.parquet.write_table(pyarrow.table({"input": rows}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a parquet file"):
        dataset(path, tokenizer_folder)
    path.write_bytes(whole[:100] + b"\xff" * 400 + whole[500:])
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet.*is the file whole"):
        dataset(path, tokenizer_folder)


def test_a_folder_for_a_file(tmp_path: Path, tokenizer_folder: str) -> None:
    folder = tmp_path / "a.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="a folder, not a file"):
        dataset(folder, tokenizer_folder)


TEMPLATES = {
    "syntax error": "{% for m in messages %}{{ m.content }",
    "division by zero": "{{ 1 / 0 }}",
    "index": "{{ (messages | list)[7].content.x }}",
    "refuses": "{{ raise_exception('only one turn') }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "overflow": "{{ 2.0 ** 99999 }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_that_fails_names_the_row(case: str, tmp_path: Path) -> None:
    folder = make_char_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATES[case])
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template failed"):
        dataset(path, folder, apply_chat_template=True)


# --- files and folders named by flags ---

FLAGS: dict[str, tuple[dict[str, str], str]] = {
    "no prompt file": ({"prompt_data": "/no/such.jsonl"}, r"--prompt-data.*/no/such\.jsonl"),
    "no model": ({"hf_checkpoint": "/no/model"}, "--hf-checkpoint /no/model: there is no config"),
    "no checkpoint": ({"ref_load": "/no/ref"}, "--ref-load /no/ref"),
    "no evaluation file": (
        {"eval_prompt_data": "x /no/eval.jsonl", "eval_interval": "1"},
        r"x.*/no/eval\.jsonl",
    ),
    "YAML broken": ({"custom_config_path": "{tmp}/broken.yaml"}, "is no YAML"),
    "YAML a list": ({"custom_config_path": "{tmp}/list.yaml"}, "must hold `name: value` lines"),
    "YAML missing": ({"custom_config_path": "{tmp}/no.yaml"}, "cannot read"),
    "YAML binary": ({"custom_config_path": "{tmp}/binary.yaml"}, "cannot read|is no YAML"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_that_names_nothing_usable(case: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0\0a: 1")
    changes, message = FLAGS[case]
    argv = base_argv(tmp_path)
    for name, value in changes.items():
        argv += ["--" + name.replace("_", "-"), *value.format(tmp=tmp_path).split()]
    with pytest.raises(ConfigError, match=message):
        load_config(argv)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_a_model_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or cut short|has no tensor"):
        HfFolder(tmp_path).tensor("model.embed_tokens.weight")


STATES: dict[str, Any] = {
    "a list": [],
    "no counters": {"version": 1},
    "words for numbers": {"version": 1, "sample_offset": "x", "epoch_id": None},
    "an unknown kind": {"version": 1, "metadata": {"__slime__": "code"}},
}


@pytest.mark.parametrize("case", STATES)
def test_a_damaged_data_state(case: str, tmp_path: Path) -> None:
    path = state_path(str(tmp_path), 0)
    write_json(path, STATES[case])
    args = make_args("http://127.0.0.1:1", load=str(tmp_path), rollout_global_dataset=False)
    with pytest.raises(CheckpointError, match=path.name):
        RolloutDataSource(args).load(0)


# --- engines: an answer that cannot be fails its samples and changes nothing else ---


def answer(**meta_info: Any) -> dict[str, Any]:
    """A right answer of two tokens, but for what is given."""
    good = {
        "finish_reason": {"type": "stop"},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "weight_version": "1",
        "output_token_logprobs": [[-0.5, 20, None], [-0.25, 21, None]],
    }
    return {"text": "ab", "output_ids": [20, 21], "meta_info": good | meta_info}


def log_probs(*pairs: Any) -> dict[str, Any]:
    return answer(output_token_logprobs=list(pairs)) | {"output_ids": None}


GARBAGE: dict[str, Any] = {
    "no JSON": b"<html>502</html>",
    "half JSON": b'{"text": "a", "meta_info": {',
    "NaN in JSON": b'{"meta_info": {"output_token_logprobs": [[NaN, 20, null]]}}',
    "empty": b"",
    "a number": b"7",
    "null": b"null",
    "a list of numbers": [1, 2],
    "meta_info a list": {"text": "a", "meta_info": []},
    "no log-probs": answer(output_token_logprobs=None),
    "log-probs a word": answer(output_token_logprobs="none"),
    "log-probs an object": answer(output_token_logprobs={"0": [-0.5, 20]}),
    "log-prob null": log_probs([None, 20, None]),
    "log-prob a word": log_probs(["NaN", 20, None]),
    "log-prob above 0": log_probs([0.7, 20, None]),
    "log-prob true": log_probs([True, 20, None]),
    "log-prob beyond float": b'{"meta_info": {"output_token_logprobs": [[-1e999, 20, null]]}}',
    "id a word": log_probs([-0.5, "20", None]),
    "id a fraction": log_probs([-0.5, 20.5, None]),
    "id null": log_probs([-0.5, None, None]),
    "id negative": log_probs([-0.5, -1, None]),
    "id outside the vocabulary": log_probs([-0.5, 106, None]),
    "id huge": log_probs([-0.5, 2**63 - 1, None]),
    "entry too short": log_probs([-0.5]),
    "more tokens than asked": log_probs(*([-0.5, 20, None] for _ in range(17))),
    "lists of unequal length": answer() | {"output_ids": [20]},
    "lists that differ": answer() | {"output_ids": [20, 22]},
    "text a number": answer() | {"text": 7},
    "counter a word": answer(cached_tokens="many"),
    "counter negative": answer(prompt_tokens=-1),
    "counter a list": answer(completion_tokens=[2]),
    "counter nothing": answer(spec_verify_ct={}),
    "version an object": answer(weight_version={"a": 1}),
    "finish reason unknown": answer(finish_reason={"type": "tired"}),
    "finish reason a number": answer(finish_reason=7),
    "finish reason a list": answer(finish_reason={"type": ["stop"]}),
    "experts no base64": answer(routed_experts="%%%"),
    "experts cut": answer(routed_experts="AAA="),
}


def reply(content: Any) -> Reply:
    return Reply(body=content if isinstance(content, bytes) else orjson.dumps(content))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokenizer and config.json: a vocabulary of 106 ids."""
    folder = tmp_path_factory.mktemp("model")
    make_char_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 106}))
    return str(folder)


def samples(number: int) -> list[Sample]:
    return [Sample(group_index=0, index=i, prompt="p", tokens=[5, 6]) for i in range(number)]


@pytest.mark.parametrize("case", GARBAGE)
async def test_garbage_from_an_engine_fails_one_sample(case: str, model_folder: str) -> None:
    async with fake_engine(lambda payload, number: reply(GARBAGE[case])) as engine:
        args = make_args(engine.url, hf_checkpoint=model_folder, request_timeout_s=5.0)
        [sample] = samples(1)
        await generate_and_rm(args, sample, {"max_new_tokens": 16})
        assert sample.status is Status.FAILED
        assert sample.metadata["error_cat"] == "engine_protocol", sample.metadata
        assert (sample.tokens, sample.response_length, sample.reward) == ([5, 6], 0, None)
        assert sample.remove_sample
        with pytest.raises(EngineError, match="all 1 samples failed; the first cause"):
            raise_if_all_failed(GenerateState(args), [[sample]], "rollout 0")


@pytest.mark.parametrize("case", GARBAGE)
async def test_garbage_among_the_answers_of_a_group(case: str, model_folder: str) -> None:
    """One request for a whole group: it must not end the run either."""
    content = GARBAGE[case]
    content = content if isinstance(content, bytes) else [answer(), content]
    async with fake_engine(lambda payload, number: reply(content)) as engine:
        args = make_args(
            engine.url, hf_checkpoint=model_folder, engine_supports_group_seeds=True,
            request_timeout_s=5.0,
        )  # fmt: skip
        group = samples(2)
        await generate_and_rm_group(args, group, {"max_new_tokens": 16})
        assert group[1].status is Status.FAILED
        assert group[1].metadata["error_cat"] == "engine_protocol"
        for sample in group:
            sample.validate(vocab_size=106)


async def test_a_right_answer_passes(model_folder: str) -> None:
    async with fake_engine(lambda payload, number: reply(answer())) as engine:
        [sample] = samples(1)
        args = make_args(engine.url, hf_checkpoint=model_folder)
        await generate_and_rm(args, sample, {"max_new_tokens": 2})
        assert (sample.status, sample.tokens) == (Status.COMPLETED, [5, 6, 20, 21])


async def test_an_engine_that_dies_in_the_middle_of_a_request(model_folder: str) -> None:
    async with fake_engine(lambda payload, number: Reply(disconnect=True)) as engine:
        args = make_args(engine.url, hf_checkpoint=model_folder, request_timeout_s=0.5)
        [sample] = samples(1)
        await generate_and_rm(args, sample, {"max_new_tokens": 2})
        assert sample.metadata["error_cat"] == "engine_unavailable"


# --- generate functions of users ---


def _bad(change: Callable[[Sample], Any]) -> Callable[..., Any]:
    async def generate(args: Any, sample: Sample, sampling_params: Any) -> Any:
        sample.tokens = [5, 6, 20]
        sample.response_length = 1
        sample.rollout_log_probs = [-0.5]
        result = change(sample)
        return sample if result is None else result

    return generate


class _Nothing:
    """Stands for a sample in what a function returns."""


BAD_GENERATE: dict[str, Callable[[Sample], Any]] = {
    "a number": lambda sample: 7,
    "an empty list": lambda sample: [],
    "a list with something else": lambda sample: [sample, _Nothing()],
    "its dict": lambda sample: sample.to_dict(),
    "mask too short": lambda sample: setattr(sample, "loss_mask", []),
    "mask of twos": lambda sample: setattr(sample, "loss_mask", [2]),
    "mask of words": lambda sample: setattr(sample, "loss_mask", ["1"]),
    "log-probs of nothing": lambda sample: setattr(sample, "rollout_log_probs", [None]),
    "log-probs NaN": lambda sample: setattr(sample, "rollout_log_probs", [math.nan]),
    "id outside": lambda sample: setattr(sample, "tokens", [5, 6, 106]),
    "id negative": lambda sample: setattr(sample, "tokens", [5, 6, -100]),
    "ids as text": lambda sample: setattr(sample, "tokens", ["5", "6", "7"]),
    "ids nested": lambda sample: setattr(sample, "tokens", [[5], [6], [7, 8]]),
    "ids None": lambda sample: setattr(sample, "tokens", None),
    "longer than it is": lambda sample: setattr(sample, "response_length", 9),
    "length a word": lambda sample: setattr(sample, "response_length", "1"),
    "reward NaN": lambda sample: setattr(sample, "reward", math.nan),
    "reward infinite": lambda sample: setattr(sample, "reward", math.inf),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
async def test_nonsense_from_a_generate_function_fails_one_sample(
    case: str, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import support.rollout_plugins as plugins

    from slime.plugins import load_function

    monkeypatch.setattr(plugins, "nonsense", _bad(BAD_GENERATE[case]), raising=False)
    load_function.cache_clear()
    args = make_args(
        "http://127.0.0.1:1", hf_checkpoint=model_folder,
        custom_generate_function_path="support.rollout_plugins.nonsense",
    )  # fmt: skip
    [sample] = samples(1)
    before = deepcopy(sample)
    await generate_and_rm(args, sample, {})
    assert sample.status is Status.FAILED
    assert sample.metadata["error_cat"] == "generate"
    assert (sample.tokens, sample.response_length) == (before.tokens, 0)
    load_function.cache_clear()


# --- a full disk ---


@contextmanager
def files_limited_to(num_bytes: int) -> Generator[None]:
    """Every write beyond `num_bytes` of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_metrics_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"rollout/raw_reward": 0.5}, step_key="rollout/step", step=0)
    with (
        files_limited_to(100),
        pytest.raises(SlimeError, match=r"cannot write .*metrics\.jsonl.*MiB"),
    ):
        tracker.log({"rollout/raw_reward": 0.25}, step_key="rollout/step", step=1)
    tracker.close()
    # The half line does not spoil what a resumed run writes.
    resumed = JsonlTracker(path)
    resumed.log({"rollout/raw_reward": 0.25}, step_key="rollout/step", step=1)
    resumed.close()
    assert [row["rollout/step"] for row in read_metrics(path)] == [0, 1]


def test_a_full_disk_while_the_data_state_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"offset": 1})
    with files_limited_to(50), pytest.raises(CheckpointError, match="make room"):
        write_json(path, {"offset": 2, "buffer": ["x" * 1000]})
    assert json.loads(path.read_text()) == {"offset": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["state.json"]
