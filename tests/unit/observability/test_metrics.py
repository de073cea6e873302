import math

import pytest

from slime.observability.metrics import (
    METRICS,
    find,
    format_number,
    spread,
    summary_line,
    unknown_names,
)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("rollout/response_len/median", "tokens"),
        ("rollout/zero_std/count_1.0", "groups"),
        ("rollout/dynamic_filter/drop_zero_std_0.0", "groups"),
        ("eval/aime-2024", "1"),
        ("eval/aime-2024/response_len/max", "tokens"),
        ("eval/aime-truncated_ratio", "fraction"),
        ("eval/aime-pass@8", "fraction"),
        ("train/train_rollout_logprob_abs_diff", "nats"),
        ("train/lr-pg_0", "1"),
        ("perf/update_weights_time", "s"),
        ("perf/request/e2e_latency/mean", "s"),
    ],
)
def test_documented_names_are_registered(name: str, unit: str):
    metric = find(name)
    assert metric is not None
    assert metric.unit == unit


@pytest.mark.parametrize("name", ["rollout/response_len", "train/los", "perf/x/y_time", "loss"])
def test_other_names_are_not(name: str):
    assert find(name) is None
    assert unknown_names([name, "train/loss"]) == [name]


def test_no_name_is_registered_twice():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))


def test_spread_by_hand():
    assert spread("rollout/response_len", [4, 1, 1, 2]) == {
        "rollout/response_len/mean": 2.0,
        "rollout/response_len/median": 1.5,
        "rollout/response_len/max": 4.0,
        "rollout/response_len/min": 1.0,
    }
    assert spread("rollout/response_len", []) == {}


def test_summary_shows_the_chosen_metrics_in_order_with_their_units():
    metrics = {
        "perf/rollout_time": 3.14159,
        "train/grad_norm": 1.2e-5,
        "rollout/raw_reward": 0.43125,
        "eval/letters": 1.0,
    }
    names = ["rollout/raw_reward", "train/absent", "train/grad_norm", "perf/rollout_time"]
    line = summary_line(metrics, names)
    assert line == "raw_reward 0.4313  grad_norm 1.2e-05  rollout_time 3.142 s"
    assert summary_line(metrics).endswith("eval/letters 1")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (64.0, "64"), (0.43125, "0.4313"), (3e-5, "3e-05"), (12345.6, "12346")],
)
def test_numbers_stay_short(value: float, text: str):
    assert format_number(value) == text


def test_a_number_that_is_none_is_shown_as_such():
    assert format_number(math.nan) == "nan"
    assert format_number(-math.inf) == "-inf"
