"""examples/chain-sum: its reward and its split; the run itself needs a GPU and the model."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from slime.data.sample import Sample

FILE = Path(__file__).resolve().parents[2] / "examples" / "chain-sum" / "chain_sum.py"


@pytest.fixture(scope="module")
def chain_sum() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chain_sum", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("-7", 1.0),
        ("The answer is -7.", 1.0),
        ("5 - 12 = -7<|im_end|>", 1.0),
        ("5 \u2212 12 = \u22127", 1.0),
        ("-07", 1.0),
        ("7", 0.0),
        ("-7 or 8", 0.0),
        ("-70", 0.0),
        ("", 0.0),
    ],
)
async def test_the_last_number_is_the_answer(
    chain_sum: ModuleType, response: str, reward: float
) -> None:
    sample = Sample(response=response, label="-7", status=Sample.Status.COMPLETED)
    assert await chain_sum.reward(None, sample) == reward


async def test_an_answer_without_an_end_earns_nothing(chain_sum: ModuleType) -> None:
    sample = Sample(response="-7", label="-7", status=Sample.Status.TRUNCATED)
    assert await chain_sum.reward(None, sample) == 0.0


def test_a_tenth_of_the_pairs_is_held_out_in_either_order(chain_sum: ModuleType) -> None:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    held_out = {pair for pair in pairs if chain_sum.is_held_out(pair)}
    assert 0.08 < len(held_out) / len(pairs) < 0.12
    assert held_out == {(b, a) for a, b in held_out}
