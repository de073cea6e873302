"""--fully-async: what follows from it, and what does not go together with it."""

import logging
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.async_rules import FULLY_ASYNC_ROLLOUT
from slime.config.resolve import check_alternating, check_overlapping
from slime.errors import ConfigError


@pytest.mark.parametrize(
    "flags", [{"fully_async": ""}, {"rollout_function_path": FULLY_ASYNC_ROLLOUT}]
)
def test_the_flag_and_the_documented_function_say_the_same(
    tmp_path: Path, flags: dict[str, str | None]
) -> None:
    config = load_config(base_argv(tmp_path, **flags, use_tis=""))
    assert config.fully_async
    assert config.update_weights_in_flight
    assert config.rollout_function_path == config.eval_function_path == FULLY_ASYNC_ROLLOUT
    check_overlapping(config)
    with pytest.raises(ConfigError, match=r"--fully-async: train\.py generates a round, then"):
        check_alternating(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"rollout_function_path": "slime.rollout.sft_rollout.generate_rollout"},
            "--fully-async and --rollout-function-path slime.rollout.sft_rollout",
        ),
        ({"debug_train_only": ""}, "nothing is generated with --debug-train-only"),
        (
            {"partial_rollout": "", "mask_offpolicy_in_partial_rollout": ""},
            "--mask-offpolicy-in-partial-rollout: with --fully-async",
        ),
        (
            {"update_weights_interval": "4"},
            "--max-weight-staleness 2 with --update-weights-interval 4: .* give at least 3",
        ),
        ({"max_weight_staleness": "-1"}, "--max-weight-staleness"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, flags: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(base_argv(tmp_path, fully_async="", **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "as if they were fresh; --use-tis corrects"),
        ({"use_tis": "", "over_sampling_batch_size": "64"}, "--over-sampling-batch-size 64 has no"),
        ({"use_tis": ""}, None),
        ({"max_weight_staleness": "0"}, None),
    ],
)
def test_what_is_seldom_meant_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flags: dict[str, str | None],
    message: str | None,
) -> None:
    with caplog.at_level(logging.WARNING, logger="slime.config.async_rules"):
        load_config(base_argv(tmp_path, fully_async="", **flags))
    said = [r.getMessage() for r in caplog.records if r.name == "slime.config.async_rules"]
    assert any(message in text for text in said) if message else not said
