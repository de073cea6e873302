import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from slime.data.sample import Sample
from slime.rollout.rm_hub import code
from slime.rollout.rm_hub.base import BadReward

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ARGS = SimpleNamespace(
    label_key="label",
    sandbox_programs=None,
    sandbox_memory_mb=256,
    sandbox_output_kb=64,
    sandbox_packages=[],
    sandbox_cpu_s=2,
    sandbox_wall_s=10.0,
)
SUMS = {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\n", "11\n"]}
SQUARES = ["assert square(2) == 4", "assert square(-3) == 9"]


def answer(program: str) -> str:
    return (
        f"<think>```python\nprint(0)\n```</think>Here:\n```python\n{program}\n```\nDone.<|im_end|>"
    )


async def reward(program: str, label: Any, **metadata: Any) -> float:
    return await code.reward(ARGS, Sample(response=answer(program), label=label, metadata=metadata))


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("a, b = map(int, input().split())\nprint(a + b, end='')", 1.0),
        ("print(3)", 0.0),  # right for the first test alone
        ("print('3\\n11')", 0.0),
        ("print(sum(map(int, input().split())))\nraise SystemExit(1)", 0.0),
        ("while True: pass", 0.0),
        ("", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("print(open('/etc/hostname').read())", 0.0),
    ],
)
async def test_what_a_program_writes_for_what_it_reads(program: str, score: float) -> None:
    assert await reward(program, SUMS) == score


async def test_labels_may_be_json_or_pairs_and_metadata_goes_first() -> None:
    program = "print(sum(map(int, input().split())))"
    pairs = [{"input": ["1 2"], "output": 3}]
    assert await reward(program, json.dumps(SUMS)) == 1.0
    assert await reward(program, pairs) == 1.0
    assert await reward(program, "whatever", tests=json.dumps(pairs)) == 1.0


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("def square(n): return n * n", 1.0),
        ("def square(n): return 4", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("class A:\n    def __eq__(self, other): return True\ndef square(n): return A()", 0.0),
        ("def square(n):\n    import os\n    os._exit(0)", 0.0),
    ],
)
async def test_assert_statements(program: str, score: float) -> None:
    assert await reward(program, SQUARES) == score
    assert await reward(program, json.dumps(SQUARES)) == score
    checked = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(4) == 16\n"
    assert await reward(program, checked, entry_point="square") == score


async def test_functions_and_methods_by_name() -> None:
    tests = {"fn_name": "add", "inputs": [[1, 2], [[3], [4]]], "outputs": [3, [3, 4]]}
    assert await reward("def add(a, b): return a + b", tests) == 1.0
    assert await reward("class Solution:\n    def add(self, a, b): return a + b", tests) == 1.0
    assert await reward("def add(a, b): return b", tests) == 0.0


@pytest.mark.parametrize(
    "label",
    [
        "",
        "no tests",
        {},
        [],
        [""],
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        "[1",
    ],
)
async def test_without_tests_nothing_passes(label: Any) -> None:
    with pytest.raises(BadReward):
        await reward("pass", label)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\n```py\nb\n```\n", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\noutput:\n```text\nb\n```", "a\n"),
        ("```python\na", None),
        ("<think>```python\na\n```", None),
        ("a", None),
    ],
)
def test_the_last_closed_block_counts(response: str, program: str | None) -> None:
    assert code.last_program(response) == program


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1\n2", "1 2", False),
        ("0.33333333", "0.333333333333", True),
        ("0.3", "0.333333", False),
        ("1e300", "1.5", False),
        ("nan", "1.5", False),
        ("1.0", "1", False),
        ("yes", "YES", False),
        ("", "", True),
    ],
)
def test_the_same_output(given: str, expected: str, same: bool) -> None:
    assert code.same_output(given, expected) is same
