import sys
from collections import Counter, deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.sandbox.calls import decode, encode
from slime.sandbox.sandbox import Sandbox

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
_KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.booleans())
_VALUES = st.recursive(
    _SCALARS | st.complex_numbers(allow_nan=False) | st.fractions(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(_KEYS, inner)
        | st.sets(_KEYS)
        | st.frozensets(_KEYS)
    ),
    max_leaves=10,
)


def _refuse(value: Any) -> Any:
    raise TypeError(type(value).__name__)


@given(_VALUES)
def test_plain_data_cross_as_they_are(value: Any) -> None:
    import json

    text = json.dumps(encode(value, _refuse))
    back = decode(json.loads(text), _refuse)
    assert back == value
    assert type(back) is type(value)


def test_subclasses_cross_as_what_they_derive_from() -> None:
    for value, plain in [
        (Counter("aab"), {"a": 2, "b": 1}),
        (np.int64(3), 3),
        (np.array([[1.5]]), [[1.5]]),
        (Decimal("0.10"), Decimal("0.10")),
        (Fraction(1, 3), Fraction(1, 3)),
        (bytearray(b"x"), b"x"),
    ]:
        back = decode(encode(value, _refuse), _refuse)
        assert back == plain
        assert type(back) is type(plain)
    with pytest.raises(TypeError, match="deque"):
        encode(deque([1]), _refuse)


@pytest.mark.parametrize("data", [[1], {}, {"l": [], "t": []}, {"x": 1}])
def test_what_encode_never_makes_is_refused(data: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each tells another reason
        decode(data, _refuse)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(max_programs=2).start()
    yield box
    box.close()


GOOD = {
    "a value": ("x = {1: [2]}", "assert x == {1: [2]}"),
    "a function": ("def add(a, b=1): return a + b", "assert add(1) == 2\nassert add(1, b=3) == 4"),
    "check of a candidate": (
        "def f(s): return s[::-1]",
        "def check(candidate):\n    assert candidate('ab') == 'ba'\ncheck(f)",
    ),
    "its exception": (
        "def f(): raise KeyError('k')",
        "try: f()\nexcept KeyError as e: assert 'k' in str(e)\nelse: assert False",
    ),
    "a class": (
        "class Stack:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n"
        "    def pop(self): return self.a.pop()",
        "s = Stack()\ns.push((1, 2))\nassert s.pop() == (1, 2)",
    ),
    "a generator": (
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "g = f()\nassert [next(g), next(g)] == [0, 1]",
    ),
    "the end of a generator": (
        "def f(): yield 1",
        "g = f()\nassert next(g) == 1\ntry: next(g)\nexcept StopIteration: pass\nelse: assert False",
    ),
    "an object handed back": (
        "class Node:\n    def __init__(self, v, n=None): self.v, self.n = v, n\n"
        "def total(x): return 0 if x is None else x.v + total(x.n)",
        "assert total(Node(1, Node(2))) == 3",
    ),
    "a module of its own": ("import math", "assert math.isclose(math.sqrt(4), 2)"),
    "printing": ("print('hello')\ndef f(): print('x' * 100000)", "f()"),
}

# Code that is wrong, and tries to pass `assert answer(2) == 4 and isinstance(answer(3), int)`.
CHEATS = {
    "leave at once": "import os; os._exit(0)",
    "leave politely": "import sys; sys.exit(0)",
    "leave in the call": "import os\ndef answer(n): os._exit(0)",
    "equal everything": "class A(int):\n    def __eq__(self, o): return True\n"
    "def answer(n): return A(0)",
    "equal everything as an object": "class A:\n    def __eq__(self, o): return True\n"
    "def answer(n): return A()",
    "be what is asked for": "class A:\n    __class__ = int\n    def __eq__(self, o): return True\n"
    "def answer(n): return A()",
    "replace built-ins": "isinstance = all = any = lambda *a: True\n"
    "import builtins\nbuiltins.isinstance = isinstance\nclass A:\n    def __eq__(s, o): return True\n"
    "answer = lambda n: A()",
    "end at exit": "import atexit, os\natexit.register(os._exit, 0)\nanswer = lambda n: 0",
    "raise the error of a passed test": "def answer(n): raise SystemExit(0)",
    "speak for the tests": "import os\nos.write(3, b'{\"value\": null}\\n' * 50)\n"
    "def answer(n): return 0",
    "look for what is expected": "import gc\ndef answer(n):\n"
    "    return next((int(w.split('==')[1].split()[0]) for w in map(repr, gc.get_objects()) "
    "if 'assert answer' + '(2) ==' in w and 'gc.get' not in w), 0)",
    "patch the server": "import slime.sandbox.calls as c\nc.encode = lambda v, k: {'b': 4}\n"
    "answer = lambda n: 0",
}


@ON_LINUX
@pytest.mark.parametrize(("code", "tests"), GOOD.values(), ids=GOOD.keys())
async def test_right_code_passes(sandbox: Sandbox, code: str, tests: str) -> None:
    passed, result, _ = await sandbox.test(code, tests)
    assert passed, result.stderr


@ON_LINUX
@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS.keys())
async def test_wrong_code_cannot_pass(sandbox: Sandbox, code: str) -> None:
    tests = "assert answer(2) == 4 and isinstance(answer(3), int)"
    assert (await sandbox.test("def answer(n): return n * n", tests))[0]
    passed, _, _ = await sandbox.test(code, tests, cpu_s=2, wall_s=8)
    assert not passed


@ON_LINUX
async def test_code_cannot_give_the_tests_their_own_tools(sandbox: Sandbox) -> None:
    code = "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef half(n): return 0"
    passed, result, _ = await sandbox.test(code, "assert math.isclose(half(3), 1.5)")
    assert not passed
    assert "AssertionError" in result.stderr


@ON_LINUX
async def test_code_cannot_give_the_tests_their_built_ins(sandbox: Sandbox) -> None:
    tests = "for n in range(2, 5):\n    assert answer(n) == n * n"
    code = (
        "import slime.sandbox.calls as c\nhonest = c._perform\n"
        "def perform(namespace, objects, operation, arguments):\n"
        "    if operation == 'names':\n        return ['__builtins__', 'answer']\n"
        "    if arguments == ['__builtins__']:\n        return {'range': lambda *a: []}\n"
        "    return honest(namespace, objects, operation, arguments)\n"
        "c._perform = perform\nanswer = lambda n: 0"
    )
    assert (await sandbox.test("def answer(n): return n * n", tests))[0]
    passed, result, _ = await sandbox.test(code, tests)
    assert not passed
    assert "AssertionError" in result.stderr


@ON_LINUX
@pytest.mark.parametrize("error", ["StopIteration", "StopAsyncIteration"])
async def test_code_cannot_end_a_loop_of_the_tests(sandbox: Sandbox, error: str) -> None:
    loops = {
        "StopIteration": "assert all(map(is_right, CASES))",
        "StopAsyncIteration": (
            "class Each:\n    def __aiter__(self):\n        self.left = list(CASES)\n"
            "        return self\n    async def __anext__(self):\n"
            "        if not self.left: raise StopAsyncIteration\n"
            "        return is_right(self.left.pop())\n"
            "async def check():\n    async for right in Each(): assert right\n"
            "try: check().send(None)\nexcept StopIteration: pass"
        ),
    }
    tests = f"CASES = [(2, 4), (3, 9)]\nis_right = lambda case: answer(case[0]) == case[1]\n{loops[error]}"
    passed, result, _ = await sandbox.test("def answer(n): return n * n", tests)
    assert passed, result.stderr
    passed, _, _ = await sandbox.test(f"def answer(n): raise {error}", tests)
    assert not passed


@ON_LINUX
async def test_code_that_hangs_fails_in_time(sandbox: Sandbox) -> None:
    passed, result, served = await sandbox.test(
        "def f():\n    while True: pass", "f()", cpu_s=1, wall_s=5
    )
    assert not passed
    assert result.seconds < 5
    assert served.outcome == "timeout"
