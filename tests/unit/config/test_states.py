import logging
from pathlib import Path

import pytest
from support.config_argv import base_argv

from slime.cli.parse import load_config
from slime.config.states import WORKS, own_way, refused, works_with
from slime.errors import ConfigError


def test_what_a_state_allows() -> None:
    assert WORKS.allows(1, 0)
    assert own_way("").allows(1, 0)
    assert refused("").allows(0, 0)
    assert not refused("").allows(1, 0)
    assert refused("", 1).allows(1, 0)
    assert works_with("", "a").allows("a", "b")
    assert not works_with("", "a").allows("b", "b")
    assert works_with("", "a", "b").allows(("a", "b"), None)
    assert not works_with("", "a").allows(("a", "b"), None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--advantage-estimator", "ppo"], "--advantage-estimator ppo: not built yet"),
        (["--moe-aux-loss-coeff", "0.1"], r"--moe-aux-loss-coeff 0\.1: not built: experts would"),
        (
            ["--moe-router-load-balancing-type", "none", "sinkhorn"],
            "--moe-router-load-balancing-type none sinkhorn: experts would be chosen",
        ),
        (["--moe-router-score-function", "sqrtsoftplus"], "no family that slime knows has it"),
        (["--recompute-modules", "moe", "layernorm"], "--recompute-modules moe layernorm: "),
        (["--hybrid-context-parallel"], "nobody has tried this flag of Megatron"),
        (["--moe-use-upcycling"], "--moe-use-upcycling: not built yet: making experts"),
        (["--attention-dropout", "0.1"], "dropout is not built"),
        (["--data-path", "x"], "slime trains on rollouts"),
        (["--rl-default-top-k", "3"], "Megatron's own RL loop"),
        (["--use-torch-fsdp2"], "nobody has tried this flag of Megatron"),
        (["--sglang-tp-size", "2"], "--rollout-num-gpus-per-engine"),
        (["--router-port", "1"], "it is --sglang-router-port"),
        (["--rollout-top-p", "0.9"], "nucleus"),
    ],
)
def test_refused_flags_say_why(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*base_argv(tmp_path), *argv])


def test_a_refused_flag_may_say_what_is_so_anyway(tmp_path: Path) -> None:
    harmless = ["--moe-aux-loss-coeff", "0", "--attention-dropout", "0", "--value-clip=0.2"]
    load_config([*base_argv(tmp_path), *harmless])


def test_what_we_do_our_own_way_is_logged_and_kept_from_megatron(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = ["--moe-permute-fusion", "--attention-backend", "flash", "--post-mlp-layernorm"]
    with caplog.at_level(logging.INFO):
        config = load_config([*base_argv(tmp_path), *argv, "--check-weight-update-equal"])
    assert not {"--moe-permute-fusion", "--attention-backend", "flash"} & set(config.megatron_argv)
    for name in ("--moe-permute-fusion", "--attention-backend", "--check-weight-update-equal"):
        assert f"{name}: " in caplog.text
