from pathlib import Path

import pytest
from support.config_argv import base_argv, write_prompts

from slime.cli.parse import load_config
from slime.config.evaluation import EvalDataset
from slime.errors import ConfigError


def datasets(folder: Path, *argv: str) -> tuple[EvalDataset, ...]:
    return load_config([*base_argv(folder), *argv]).eval_datasets


def write_yaml(folder: Path, text: str) -> str:
    data = write_prompts(folder / "eval.jsonl")
    path = folder / "eval.yaml"
    path.write_text(text.replace("DATA", str(data)))
    return str(path)


def test_pairs_of_name_and_path(tmp_path: Path) -> None:
    data = str(write_prompts(tmp_path / "eval.jsonl"))
    found = datasets(tmp_path, "--eval-prompt-data", "a", data, "b", f"{data}@[0:1]")
    assert [(item.name, item.path) for item in found] == [("a", data), ("b", f"{data}@[0:1]")]


def test_one_path_alone_is_called_aime(tmp_path: Path) -> None:
    data = str(write_prompts(tmp_path / "eval.jsonl"))
    assert datasets(tmp_path, "--eval-prompt-data", data)[0].name == "aime"


def test_settings_follow_from_eval_flags_and_then_from_the_rollout(tmp_path: Path) -> None:
    data = str(write_prompts(tmp_path / "eval.jsonl"))
    (found,) = datasets(
        tmp_path,
        *("--eval-prompt-data", data, "--eval-temperature", "0", "--rollout-top-k", "7"),
        *("--rollout-max-response-len", "9", "--eval-label-key", "gold", "--rollout-stop", "x"),
        *("--eval-max-context-len", "30"),
    )
    assert (found.temperature, found.top_k, found.max_response_len) == (0.0, 7, 9)
    assert (found.label_key, found.input_key, found.rm_type) == ("gold", "input", "exact_match")
    assert (found.stop, found.no_stop_trim, found.max_prompt_len) == (("x",), True, 29)


def test_a_yaml_file_has_defaults_and_overrides(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path,
        """
        eval:
          defaults: {temperature: 1, n_samples_per_eval_prompt: 4}
          datasets:
            - {name: a, path: DATA}
            - {name: b, path: DATA, temperature: 0.5, stop: [x, y], rm_type: math,
               metadata_overrides: {k: v}}
        """,
    )
    first, second = datasets(tmp_path, "--eval-config", path)
    assert (first.temperature, first.n_samples_per_eval_prompt) == (1.0, 4)
    assert (second.temperature, second.stop, second.rm_type) == (0.5, ("x", "y"), "math")
    assert second.metadata_overrides == {"k": "v"}


def test_a_datasets_own_reward_goes_before_the_runs_function(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path,
        "eval: {datasets: [{name: a, path: DATA, rm_type: math}, {name: b, path: DATA}]}",
    )
    first, second = datasets(tmp_path, "--eval-config", path, "--custom-rm-path", "m.f")
    assert (first.custom_rm_path, second.custom_rm_path) == (None, "m.f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "found no `eval:`"),
        ("- 1", "found no `eval:`"),
        ("eval: {datasets: []}", "at least one dataset"),
        ("eval: {datasets: [3]}", "dataset 0 must be `name: value` lines"),
        ("eval: {datasets: [{name: a}]}", "a dataset needs path"),
        ("eval: {datasets: [{name: a, path: b, temprature: 1}]}", "did you mean 'temperature'"),
        ("eval: {datasets: [{name: a, path: b, top_k: x}]}", "top_k must be int, found 'x'"),
        ("eval: {datasets: [{name: a, path: b, top_k: true}]}", "top_k must be int"),
        ("eval: {datasets: [{name: a, path: b}, {name: a, path: c}]}", "called 'a'; rename"),
        ("eval: {", "cannot read"),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets(tmp_path, "--eval-config", write_yaml(tmp_path, text))


def test_names_and_paths_must_pair_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes pairs `name path`, found 3 words"):
        datasets(tmp_path, "--eval-prompt-data", "a", "b", "c")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        datasets(tmp_path, "--eval-config", "/nowhere")
