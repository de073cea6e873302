from pathlib import Path

import pytest

from slime.config.config import Config
from slime.config.hooks import ROLLOUT_HOOKS, TRAIN_HOOKS, check_hooks
from slime.errors import ConfigError
from slime.plugins import HOOKS
from slime.training.losses import ICEPOP_PATH


def test_each_hook_belongs_to_one_side() -> None:
    assert sorted((*ROLLOUT_HOOKS, *TRAIN_HOOKS)) == sorted(HOOKS)


def test_every_hook_is_a_flag() -> None:
    assert not [name for name in HOOKS if not hasattr(Config(), name)]


def test_given_functions_are_loaded_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hooks_of_a_user.py").write_text(
        "async def reward(args, sample): return 1.0\ndef sample_hook(args): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("custom_rm_path", "rollout_sample_hook_path")
    check_hooks(Config(custom_rm_path="hooks_of_a_user.reward"), names)
    wrong = Config(rollout_sample_hook_path=("hooks_of_a_user.sample_hook",))
    with pytest.raises(
        ConfigError, match=r"--rollout-sample-hook-path hooks_of_a_user.sample_hook"
    ):
        check_hooks(wrong, names)


def test_a_documented_function_that_is_built_in_needs_no_module() -> None:
    check_hooks(Config(custom_tis_function_path=ICEPOP_PATH), ["custom_tis_function_path"])
