import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.config_argv import base_argv

from slime.cli.parse import apply_yaml, load_config, parse
from slime.config.index import command_line_index
from slime.errors import ConfigError


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "custom.yaml"
    path.write_text(text)
    return str(path)


def test_each_flag_goes_to_its_owner() -> None:
    config = parse(
        [
            *("--rollout-batch-size", "4", "--num-attention-heads", "8", "--swiglu"),
            *("--sglang-context-length", "512", "--router-policy", "random", "--lr", "0.1"),
        ]
    )
    assert config.rollout_batch_size == 4
    assert config.lr == 0.1
    assert config.megatron_argv == ("--num-attention-heads", "8", "--swiglu")
    assert config.sglang_argv == {"context_length": 512}
    assert config.router_argv == {"policy": "random"}


def test_slime_owns_what_both_slime_and_another_know() -> None:
    index = command_line_index()
    for name in ("--wandb-project", "--seed", "--sglang-config", "--num-layers"):
        option = index.find(name)
        assert option is not None
        assert option.owner == "slime", name


def test_parsing_derives_nothing() -> None:
    config = parse(["--rollout-batch-size", "4"])
    assert (config.global_batch_size, config.eps_clip_high, config.megatron_argv) == (
        None,
        None,
        (),
    )


def test_booleans_of_slime() -> None:
    config = parse(["--colocate", "--no-offload-train", "--no-verify-weight-sync"])
    assert (config.colocate, config.offload_train, config.offload_rollout) == (True, False, None)
    assert config.verify_weight_sync is False


def test_repeated_flags() -> None:
    argv = ["--rollout-sample-hook-path", "a.b", "--rollout-sample-hook-path", "c.d"]
    config = parse([*argv, "--lr", "1", "--lr", "2"])
    assert (config.rollout_sample_hook_path, config.lr) == (("a.b", "c.d"), 2.0)


def test_json_flags() -> None:
    config = parse(["--apply-chat-template-kwargs", '{"enable_thinking": false}'])
    assert config.apply_chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--rollout-batchsize", "--rollout-batch-size"),
        ("--sglang-mem-fraction", "--sglang-mem-fraction-static"),
        ("--num-atention-heads", "--num-attention-heads"),
        ("--router-polcy", "--router-policy"),
        ("--no-colocate", "--colocate"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown flag {flag}; did you mean '{hint}'"):
        parse([flag, "1"])


def test_yaml_wins_over_the_command_line_and_is_checked(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path,
        """
        eps_clip: 0.3
        n-samples-per-prompt: 2
        colocate: true
        num_attention_heads: 4
        swiglu: false
        sglang_context_length: 64
        """,
    )
    argv = base_argv(tmp_path, custom_config_path=path, eps_clip="0.1", swiglu="")
    config = load_config(argv)
    assert (config.eps_clip, config.eps_clip_high) == (0.3, 0.3)
    assert (config.n_samples_per_prompt, config.global_batch_size) == (2, 8)
    assert config.colocate
    assert config.megatron_argv[:2] == ("--num-attention-heads", "4")
    assert "--swiglu" not in config.megatron_argv
    assert config.sglang_argv == {"context_length": 64}


def test_other_keys_of_the_yaml_reach_plugins_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_yaml(tmp_path, "tis_mode: truncate\neps_clp: 1\n")
    with caplog.at_level(logging.WARNING):
        config = load_config(base_argv(tmp_path, custom_config_path=path))
    assert config.to_namespace().tis_mode == "truncate"
    assert "'eps_clp' is no flag; plugins find it in args; did you mean '--eps-clip'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: abc", "--lr takes a value of type float"),
        ("colocate: 3", "write true or false"),
        ("freeze_indexer: true", "--freeze-indexer: not built yet"),
        ("global_batch_size: 12", "does not divide"),
        ("- a", "must hold `name: value` lines"),
        ("a: {", "is no YAML"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    argv = base_argv(tmp_path, custom_config_path=write_yaml(tmp_path, text))
    with pytest.raises(ConfigError, match=message):
        load_config(argv)


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        load_config(base_argv(tmp_path, custom_config_path="/nowhere"))


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "")
    assert load_config(base_argv(tmp_path, custom_config_path=path)).custom == {}


def test_help_is_shown_and_nothing_else_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--no-such-flag", "--help"])
    assert stop.value.code == 0
    assert "--rollout-batch-size INT" in capsys.readouterr().out


_SPELLINGS = [name for option in command_line_index().options for name in option.names]
_WORDS = st.one_of(
    st.sampled_from(_SPELLINGS),
    st.sampled_from(["1", "-1", "0.5", "1e-6", "nan", "inf", "true", "{}", "[1]", "", "-", "--"]),
    st.text(max_size=6),
    st.builds("{}={}".format, st.sampled_from(_SPELLINGS), st.text(max_size=4)),
    st.builds(str.__add__, st.sampled_from(_SPELLINGS), st.text("abc-=_", max_size=2)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(argv=st.lists(_WORDS, max_size=8))
def test_any_words_give_a_config_or_a_config_error(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        return
    try:
        config = parse(argv)
    except ConfigError:
        return
    assert config.to_json()
    assert config.to_namespace()


_YAML_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    content=st.dictionaries(
        st.sampled_from([name.removeprefix("--") for name in _SPELLINGS]), _YAML_VALUES, max_size=3
    )
)
def test_any_yaml_gives_a_config_or_a_config_error(content: dict[str, Any]) -> None:
    try:
        given_flags, custom = apply_yaml([], content, where="test")
    except ConfigError:
        return
    assert custom == {}
    assert len({item.option.name for item in given_flags}) <= len(content)
