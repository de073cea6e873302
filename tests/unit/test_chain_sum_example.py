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


async def rewarded(
    chain_sum: ModuleType, response: str, metadata: dict[str, str]
) -> dict[str, float]:
    """Of an ended answer to 5 - 22."""
    status = Sample.Status.COMPLETED
    sample = Sample(response=response, label="-17", metadata=metadata, status=status)
    return await chain_sum.reward(None, sample)


@pytest.mark.parametrize(
    ("response", "right", "score"),
    [
        ("-17", 1.0, 1.0),
        ("The answer is -17.", 1.0, 1.0),
        ("5 - 22 = -17<|im_end|>", 1.0, 1.0),
        ("5 \u2212 22 = \u221217", 1.0, 1.0),
        ("-017", 1.0, 1.0),
        ("17", 0.0, 1 / 3),
        ("-17 or 8", 0.0, 0.0),
        ("17 or -8", 0.0, 1 / 6),
        ("-170", 0.0, 1 / 8),
        ("-7", 0.0, 1 / 3),
        ("-1700", 0.0, 0.0),
        ("-18", 0.0, 1 / 3),
        ("117", 0.0, 1 / 4),
        ("-20", 0.0, 1 / 6),
        ("", 0.0, 0.0),
    ],
)
async def test_the_last_number_is_the_answer(
    chain_sum: ModuleType, response: str, right: float, score: float
) -> None:
    assert await rewarded(chain_sum, response, {}) == {
        "right": right,
        "score": pytest.approx(score),
    }


@pytest.mark.parametrize(
    ("response", "right", "score"),
    [
        ("5 - 22 = -(22 - 5) = -17", 1.0, 1.0),
        ("5 - 22 = -17", 1.0, 1.0),
        ("5 - 22 = -(22 - 5) = -18", 0.0, 1 / 3 + 1 / 4),
        ("5 - 22 = -(22 - 5) = 170", 0.0, 1 / 4),
        ("5 - 22 = -(5 - 22) = -18", 0.0, 1 / 3),
        ("5 - 22 = -(22 - 5", 0.0, 0.0),
    ],
)
async def test_a_wrong_answer_with_the_right_step_earns_a_quarter(
    chain_sum: ModuleType, response: str, right: float, score: float
) -> None:
    found = await rewarded(chain_sum, response, {"opposite": "22 - 5"})
    assert found == {"right": right, "score": pytest.approx(score)}


async def test_an_answer_without_an_end_earns_nothing(chain_sum: ModuleType) -> None:
    sample = Sample(response="-7", label="-7", status=Sample.Status.TRUNCATED)
    assert await chain_sum.reward(None, sample) == {"right": 0.0, "score": 0.0}


def test_a_tenth_of_the_pairs_each_is_held_out_and_to_choose_by_in_either_order(
    chain_sum: ModuleType,
) -> None:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    for name in ("held_out", "dev"):
        part = {pair for pair in pairs if chain_sum.file_of(pair) == name}
        assert 0.08 < len(part) / len(pairs) < 0.12
        assert part == {(b, a) for a, b in part}


def test_every_difference_is_trained_on_and_a_third_of_the_sums(chain_sum: ModuleType) -> None:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    assert all(chain_sum.is_trained(pair, "-") for pair in pairs)
    assert 0.3 < sum(chain_sum.is_trained(pair, "+") for pair in pairs) / len(pairs) < 0.37


def test_the_examples_of_the_prompt_are_none_of_those_held_out(chain_sum: ModuleType) -> None:
    shown = [(problem.split(), result) for problem, result in chain_sum.EXAMPLES.items()]
    assert len(shown) == 2
    for (first, sign, second), result in shown:
        total = int(first) + (int(second) if sign == "+" else -int(second))
        assert chain_sum.last_number(result) == str(total)
        assert chain_sum.file_of((int(first), int(second))) == "train"


def test_the_examples_are_a_conversation_before_the_problem(chain_sum: ModuleType) -> None:
    turns = chain_sum.conversation("15 - 43")
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 2, "user"]
    assert turns[3]["content"] == "27 - 62 ="
    assert turns[4]["content"] == "27 - 62 = -(62 - 27) = -35"
    assert turns[-1]["content"] == "15 - 43 ="
