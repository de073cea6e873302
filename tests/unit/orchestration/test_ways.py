from dataclasses import replace

import pytest

from slime.config.config import Config
from slime.engines.protocol import PauseMode
from slime.errors import ConfigError
from slime.orchestration.ways import pause_mode

SGLANG = Config(rollout_engine="sglang")


def test_each_engine_pauses_in_the_way_that_is_exact_there() -> None:
    assert pause_mode(Config(rollout_engine="embedded")) is PauseMode.RETRACT
    assert pause_mode(SGLANG) is PauseMode.ABORT
    in_place = Config(rollout_engine="embedded", update_weight_pause_mode="in_place")
    assert pause_mode(in_place) is PauseMode.IN_PLACE


def test_a_device_that_turns_out_to_be_a_gpu_is_checked_too() -> None:
    config = Config(device="auto", update_weight_pause_mode="retract")
    found = replace(config, device="cuda")
    with pytest.raises(ConfigError, match="--sglang-disable-radix-cache"):
        pause_mode(found)
    without_cache = replace(found, sglang_argv={"disable_radix_cache": True})
    assert pause_mode(without_cache) is PauseMode.RETRACT
