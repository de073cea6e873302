"""Numbers of a plan are those the run itself works with."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.config_argv import base_argv
from support.tiny_families import FAMILIES, tiny_family_config

from slime.check.model import ModelFacts
from slime.check.places import DiskFacts
from slime.check.plan import make_plan
from slime.check.start import StartFacts
from slime.check.summary import Facts, summary
from slime.checkpoint.convert import count_parameters
from slime.checkpoint.dims import ModelDims
from slime.checkpoint.mapping import load_mapping
from slime.cli.parse import load_config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_that_the_mapping_lists(model_type: str) -> None:
    config = tiny_family_config(model_type, vocab_size=106)
    shapes = load_mapping(model_type).hf_parameters(ModelDims.from_hf_config(config))
    assert count_parameters(config) == sum(math.prod(shape) for shape in shapes.values())


def test_a_checkpoint_has_room_for_every_expert() -> None:
    """Of a mixture all experts count, not only those that a token uses."""
    few, many = (
        count_parameters(tiny_family_config("qwen3_moe", vocab_size=106, num_experts=n))
        for n in (4, 8)
    )
    expert = 3 * 64 * 32 + 64  # gate, up, down; the router's row
    assert many - few == 4 * 4 * expert  # 4 layers
    facts = ModelFacts("qwen3_moe", 4, many, 2)
    assert facts.checkpoint_bytes(with_optimizer=True) == 16 * many
    assert facts.hf_bytes() == 2 * many


def devices(folder: Path, **changes: str | None) -> tuple[str, str]:
    """(how steps are cut, who sits where) in the summary of a run with these flags."""
    config = load_config(base_argv(folder, **changes))
    text = summary(
        Facts(
            config=replace(config, device="cpu"),
            model=ModelFacts("qwen3", 2, 1000, 4),
            data=[],
            start=StartFacts(None, False, 0),
            plan=make_plan(config, None, 0),
            disk=DiskFacts(None, None, None, None),
        )
    )
    rows: dict[str, Any] = {}
    label = ""
    for line in text.splitlines():
        label = line[:12].strip() or label
        rows[label] = f"{rows.get(label, '')} {line[12:]}".strip()
    return rows["steps"], rows["devices"]


def test_the_summary_says_how_ranks_share_the_model(tmp_path: Path) -> None:
    steps, ranks = devices(
        tmp_path,
        actor_num_gpus_per_node="8",
        tensor_model_parallel_size="2",
        sequence_parallel="",
        context_parallel_size="2",
        use_dynamic_batch_size="",
        max_tokens_per_gpu="100",
    )
    assert "8 training ranks (1 x 8; tensor 2 x context 2 x data 2)" in ranks
    assert "over 2 data-parallel ranks, micro-batches of at most 200 tokens" in steps


def test_the_summary_says_where_experts_are(tmp_path: Path) -> None:
    _, ranks = devices(
        tmp_path,
        actor_num_gpus_per_node="4",
        num_experts="4",
        tensor_model_parallel_size="2",
        sequence_parallel="",
        expert_model_parallel_size="2",
    )
    assert "(1 x 4; tensor 2 x data 2; experts over 2 x tensor 2)" in ranks
    _, alone = devices(tmp_path / "other", actor_num_gpus_per_node="2")
    assert "2 training ranks (1 x 2)" in alone
