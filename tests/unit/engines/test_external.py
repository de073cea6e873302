"""What an engine that somebody else runs must be before a run takes it."""

import re
from dataclasses import replace
from typing import Any

import pytest

from slime.engines.external import Wanted, is_of_run, misfit
from slime.engines.sglang.invitation import RECEIVER

WANTED = Wanted(
    kind="sglang",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    checkpoint="/models/qwen3",
    gets_weights=True,
    run="f00d",
)
SERVER: dict[str, Any] = {"tp_size": 2, "pp_size": 1, "custom_weight_loader": ["other", RECEIVER]}
MODEL = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "model_path": "/m"}


def test_an_engine_that_fits_is_taken() -> None:
    assert misfit(SERVER, MODEL, WANTED) is None
    embedded = replace(WANTED, kind="embedded")
    assert misfit({"slime_engine": "embedded"}, MODEL, embedded) is None


@pytest.mark.parametrize(
    ("server", "model", "expected"),
    [
        ({"slime_engine": "embedded"}, {}, "give --rollout-engine embedded"),
        ({}, {"model_type": "llama"}, r"serves llama \(Qwen3ForCausalLM\) \(/m\), and .* is qwen3"),
        ({}, {"architectures": ["Other"]}, r"serves qwen3 \(Other\)"),
        ({}, {"architectures": None}, "no architecture"),
        ({"disaggregation_mode": "prefill"}, {}, "disaggregation mode prefill"),
        ({"pp_size": 2}, {}, "has 2 pipeline stages"),
        ({"custom_weight_loader": None}, {}, f"start.* without --custom-weight-loader {RECEIVER}"),
        ({"custom_weight_loader": ["other"]}, {}, "through files, for servers without, are not"),
    ],
)
def test_one_that_does_not_is_told_why(
    server: dict[str, Any], model: dict[str, Any], expected: str
) -> None:
    found = misfit(SERVER | server, MODEL | model, WANTED)
    assert found is not None
    assert re.search(expected, found), found


def test_without_a_trainer_no_receiver_is_needed() -> None:
    idle = replace(WANTED, gets_weights=False)
    assert misfit(SERVER | {"custom_weight_loader": None}, MODEL, idle) is None


def test_versions_tell_whose_engine_it_is() -> None:
    assert is_of_run("adopted-by-f00d", "f00d")
    assert is_of_run("17", "f00d")
    assert not is_of_run("default", "f00d")
    assert not is_of_run("adopted-by-beef", "f00d")
