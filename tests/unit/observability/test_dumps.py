import json
import math
from pathlib import Path

import numpy as np
import pytest

from slime.errors import ConfigError, DataError
from slime.observability.dumps import (
    dump_path,
    first_groups,
    load_rollout,
    save_readable_samples,
    save_rollout,
    text_pieces,
)


def sample(index: int, group_index: int = 0) -> dict:
    return {
        "index": index,
        "group_index": group_index,
        "prompt": [{"role": "user", "content": "größer?"}],
        "tokens": [1, 2, 3],
        "rollout_log_probs": [-0.1, -1e-30],
        "reward": {"score": 0.5},
        "status": "completed",
        "rollout_routed_experts": np.arange(12, dtype=np.int32).reshape(2, 3, 2),
    }


@pytest.mark.parametrize("suffix", ["jsonl", "pt"])
def test_a_round_comes_back_bit_for_bit(tmp_path: Path, suffix: str):
    template = str(tmp_path / f"new_folder/{{rollout_id}}.{suffix}")
    samples = [sample(0), sample(1)]
    path = save_rollout(template, 7, samples)
    assert path == tmp_path / f"new_folder/7.{suffix}"
    dump = load_rollout(template, 7)
    assert dump.rollout_id == 7
    for loaded, saved in zip(dump.samples, samples, strict=True):
        experts, expected = (s.pop("rollout_routed_experts") for s in (loaded, saved))
        assert isinstance(experts, np.ndarray)
        assert experts.dtype == expected.dtype
        assert np.array_equal(experts, expected)
        assert loaded == saved
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_numbers_of_numpy_and_no_numbers_are_kept(tmp_path: Path):
    template = str(tmp_path / "{rollout_id}.jsonl")
    save_rollout(template, 0, [{"reward": np.float32(0.5), "log_prob": math.nan}])
    (loaded,) = load_rollout(template, 0).samples
    assert loaded["reward"] == 0.5
    assert math.isnan(loaded["log_prob"])


def test_a_torch_dump_needs_no_pickled_classes(tmp_path: Path):
    import torch

    path = save_rollout(str(tmp_path / "{rollout_id}.pt"), 0, [sample(0)])
    content = torch.load(path, weights_only=True)
    assert content["samples"][0]["rollout_routed_experts"].dtype == torch.int32


def test_an_object_that_is_no_data_is_refused_by_type(tmp_path: Path):
    with pytest.raises(DataError, match="a sample holds a PosixPath"):
        save_rollout(str(tmp_path / "{rollout_id}.jsonl"), 0, [{"metadata": Path("/")}])


def test_evaluations_have_names_of_their_own():
    assert dump_path("d/{rollout_id}.pt", 3, evaluation=True) == Path("d/eval_3.pt")


def test_a_template_without_the_number_is_refused():
    with pytest.raises(ConfigError, match=r"must contain \{rollout_id\}"):
        dump_path("dump.pt", 0)


@pytest.mark.parametrize(("name", "text"), [("0.jsonl", "{}\n"), ("0.jsonl", ""), ("0.pt", "x")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        load_rollout(str(tmp_path / name.replace("0", "{rollout_id}")), 0)


def test_a_missing_round_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="no rollout data of round 4"):
        load_rollout(str(tmp_path / "{rollout_id}.jsonl"), 4)


def test_a_subsample_takes_whole_groups():
    samples = [sample(i, group_index=i // 2) for i in range(8)]
    assert [s["index"] for s in first_groups(samples, 0.5)] == [0, 1, 2, 3]
    assert [s["index"] for s in first_groups(samples, 0.01)] == [0, 1]
    with pytest.raises(ConfigError, match="fraction"):
        first_groups(samples, 0.0)


def test_the_readable_file_holds_a_few_samples_and_no_tokens(tmp_path: Path):
    rows = [sample(i) | {"response": "b", "label": "b"} for i in range(4)]
    save_readable_samples(tmp_path, 5, rows, limit=2)
    lines = (tmp_path / "5.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]
    assert "tokens" not in json.loads(lines[0])
    assert "größer" in lines[0]


def decode_bytes(ids: list[int]) -> str:
    """One byte per token, as the last resort of a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_cut_over_tokens_belongs_to_its_last_one():
    ids = list("né🙂!".encode())
    assert text_pieces(ids, decode_bytes) == ["n", "", "é", "", "", "", "🙂", "!"]


def test_bytes_that_are_no_character_do_not_swallow_what_follows():
    pieces = text_pieces([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, *b"abc"], decode_bytes)
    assert "".join(pieces) == decode_bytes([0xFF] * 5 + list(b"abc"))
    assert pieces[-2:] == ["b", "c"]
    assert len(pieces) == 8


def test_a_first_word_keeps_its_space_inside_the_text():
    words = {1: "the", 2: "cat"}

    def decode(ids: list[int]) -> str:  # as sentencepiece: no space before the first word
        return " ".join(words[i] for i in ids)

    assert text_pieces([1, 2, 1], decode) == ["the", " cat", " the"]


def test_the_readable_file_holds_what_the_sample_browser_shows(tmp_path: Path):
    row = sample(0) | {
        "tokens": list(b"?ok!"),
        "response_length": 3,
        "rollout_log_probs": [-0.123456, -1e-30, 0.0],
        "loss_mask": [1, 1, 0],
        "weight_versions": ["7"],
    }
    save_readable_samples(tmp_path, 5, [row], limit=1, decode=decode_bytes)
    shown = json.loads((tmp_path / "5.jsonl").read_text())
    assert shown["pieces"] == ["o", "k", "!"]
    assert shown["rollout_log_probs"] == [-0.1235, 0.0, 0.0]
    assert shown["loss_mask"] == [1, 1, 0]
    assert (shown["weight_versions"], shown["group_index"]) == (["7"], 0)


def test_half_a_character_from_outside_does_not_stop_a_round(tmp_path: Path):
    save_readable_samples(tmp_path, 5, [sample(0) | {"response": "a\ud800b"}], limit=1)
    assert json.loads((tmp_path / "5.jsonl").read_text())["response"] == "a?b"
