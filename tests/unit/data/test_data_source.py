import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_tokenizer import make_char_tokenizer

from slime.data.data_source import (
    DataSource,
    Group,
    RolloutDataSource,
    RolloutDataSourceWithBuffer,
    state_path,
)
from slime.data.sample import Sample, Status
from slime.errors import CheckpointError, ConfigError, DataError

NUM_PROMPTS = 5


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything a data source reads of the flat namespace."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"p{i}"}) + "\n" for i in range(NUM_PROMPTS)))
    return {
        "hf_checkpoint": make_char_tokenizer(folder / "tokenizer"),
        "rollout_global_dataset": True,
        "prompt_data": str(prompts),
        "input_key": "input",
        "label_key": None,
        "metadata_key": "metadata",
        "tool_key": "tools",
        "multimodal_keys": None,
        "apply_chat_template": False,
        "apply_chat_template_kwargs": {},
        "rollout_max_prompt_len": None,
        "rollout_shuffle": True,
        "rollout_seed": 42,
        "n_samples_per_prompt": 2,
        "buffer_filter_path": None,
        "save": None,
        "load": None,
    }


def make(args: dict[str, Any], **changes: Any) -> RolloutDataSourceWithBuffer:
    return RolloutDataSourceWithBuffer(SimpleNamespace(**args | changes))


def prompts(groups: list[Group]) -> list[Any]:
    return [group[0].prompt for group in groups]


def test_groups_hold_equal_prompts_and_count_up(args: dict[str, Any]) -> None:
    source: DataSource = make(args)
    groups = source.get_samples(3) + source.get_samples(1)
    assert [sample.index for group in groups for sample in group] == list(range(8))
    assert [sample.group_index for group in groups for sample in group] == [0, 0, 1, 1, 2, 2, 3, 3]
    for first, second in groups:
        assert first.prompt == second.prompt
        assert first.tokens == second.tokens != []
        assert first.tokens is not second.tokens
    assert len(source) == NUM_PROMPTS


def test_every_epoch_holds_each_prompt_once_in_another_order(args: dict[str, Any]) -> None:
    source = make(args)
    seen = [prompt for n in (3, 4, 8) for prompt in prompts(source.get_samples(n))]
    epochs = [seen[0:5], seen[5:10], seen[10:15]]
    assert all(sorted(epoch) == [f"p{i}" for i in range(5)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert seen == prompts(make(args).get_samples(15))


def test_without_shuffle_the_file_order_repeats(args: dict[str, Any]) -> None:
    source = make(args, rollout_shuffle=False)
    assert prompts(source.get_samples(7)) == ["p0", "p1", "p2", "p3", "p4", "p0", "p1"]


def test_the_buffer_comes_first(args: dict[str, Any]) -> None:
    source = make(args)
    groups = source.get_samples(3)
    groups[1][0].status = Status.ABORTED
    source.add_samples(groups[1:])
    assert source.get_buffer_length() == 2
    again = source.get_samples(3)
    assert again[:2] == groups[1:]
    assert again[2][0].group_index == 3
    assert source.get_buffer_length() == 0


def test_a_buffer_filter_chooses(args: dict[str, Any]) -> None:
    source = make(args, buffer_filter_path="support.buffer_filters.newest_first")
    groups = source.get_samples(3)
    source.add_samples(groups)
    assert source.get_samples(2) == [groups[2], groups[1]]


@pytest.mark.parametrize(
    "group", [[], [Sample()], [Sample(), [Sample()]], [Sample(), Sample(), Sample()]]
)
def test_groups_that_do_not_fit_are_refused_and_none_is_taken(
    args: dict[str, Any], group: Any
) -> None:
    source = make(args)
    with pytest.raises(DataError, match="n_samples_per_prompt = 2"):
        source.add_samples([[Sample(), Sample()], group])
    assert source.get_buffer_length() == 0


def test_without_buffer_nothing_can_be_added(args: dict[str, Any]) -> None:
    source = RolloutDataSource(SimpleNamespace(**args))
    source.add_samples([])
    with pytest.raises(ConfigError, match="RolloutDataSourceWithBuffer"):
        source.add_samples(source.get_samples(1))


def test_without_a_dataset_samples_come_empty(args: dict[str, Any], tmp_path: Path) -> None:
    changes = {"rollout_global_dataset": False, "prompt_data": None, "hf_checkpoint": None}
    source = make(args, **changes, save=str(tmp_path), load=str(tmp_path))
    groups = source.get_samples(2)
    assert len(source) == 0
    assert [sample.index for group in groups for sample in group] == [0, 1, 2, 3]
    assert groups[0][0].prompt == ""
    source.add_samples(groups)
    source.save(0)
    again = make(args, **changes, load=str(tmp_path))
    again.load(0)
    assert again.get_samples(2) == groups


def test_prompt_data_is_needed(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--prompt-data is missing"):
        make(args, prompt_data=None)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 7)),
        st.tuples(st.just("back"), st.integers(1, 3)),
    ),
    max_size=6,
)


def play(source: RolloutDataSourceWithBuffer, actions: list[tuple[str, int]]) -> list[Group]:
    """Do the actions: get n groups, or give the last n back unfinished."""
    taken: list[Group] = []
    for action, number in actions:
        if action == "get":
            taken += source.get_samples(number)
            continue
        for group in taken[-number:]:
            for sample in group:
                sample.append_response_tokens(None, tokens=[5], log_probs=[-1e-9], text="é")
                sample.status = Status.ABORTED
                sample.metadata["start_rollout_id"] = number
        source.add_samples(taken[-number:])
        del taken[-number:]
    return taken


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(before=steps, after=st.integers(1, 12))
def test_a_resumed_source_continues_with_the_same_groups(
    args: dict[str, Any], before: list[tuple[str, int]], after: int
) -> None:
    source, resumed = make(args), make(args)
    play(source, before)
    source.metadata = {"note": [1, 2]}
    resumed.load_state_dict(orjson.loads(orjson.dumps(source.state_dict())))
    assert resumed.metadata == source.metadata
    assert resumed.buffer == source.buffer
    assert resumed.get_samples(after) == source.get_samples(after)


def test_the_state_is_json_under_the_documented_stem(args: dict[str, Any], tmp_path: Path) -> None:
    make(args, save=str(tmp_path)).save(3)
    path = tmp_path / "rollout" / "global_dataset_state_dict_3.json"
    assert path == state_path(str(tmp_path), 3)
    state = json.loads(path.read_text())
    assert state["sample_offset"] == state["epoch_id"] == 0
    assert state["buffer"] == []


def test_a_missing_state_says_what_to_do(args: dict[str, Any], tmp_path: Path) -> None:
    source = make(args, load=str(tmp_path))
    source.load(None)
    source.load(-1)
    with pytest.raises(CheckpointError, match="--start-rollout-id 0"):
        source.load(4)


def test_a_state_of_another_version_is_refused(args: dict[str, Any], tmp_path: Path) -> None:
    path = state_path(str(tmp_path), 0)
    path.parent.mkdir()
    path.write_text('{"version": 99}')
    with pytest.raises(CheckpointError, match="version 1"):
        make(args, load=str(tmp_path)).load(0)


def test_a_group_that_cannot_be_written_is_left_out_with_a_warning(
    args: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(args, save=str(tmp_path))
    groups = source.get_samples(2)
    groups[0][1].metadata["handle"] = object()
    source.add_samples(groups)
    with caplog.at_level(logging.WARNING):
        source.save(0)
    assert "group 0 of the buffer is not saved" in caplog.text
    resumed = make(args, load=str(tmp_path))
    resumed.load(0)
    assert resumed.buffer == groups[1:]


def test_changed_data_and_group_size_are_told(
    args: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(args, save=str(tmp_path))
    source.add_samples(source.get_samples(4))
    source.save(0)
    prompt_data = f"{args['prompt_data']}@[:3]"
    resumed = make(args, load=str(tmp_path), prompt_data=prompt_data, n_samples_per_prompt=3)
    with caplog.at_level(logging.WARNING):
        resumed.load(0)
    assert "written with 5 prompts, now there are 3" in caplog.text
    assert "--n-samples-per-prompt has changed" in caplog.text
    assert resumed.get_samples(1)[0][0].index == 8  # never an index twice
    assert resumed.epoch_id == 1
