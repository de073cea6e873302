"""`--rm-type code`: 1.0 if the program in the response passes all its tests, run in the sandbox.

What is expected never enters the process with the model's code: output is compared here, and assert
statements run in a second sandboxed process (slime/sandbox/calls.py).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part
from slime.rollout.rm_hub.base import BadReward, label_of
from slime.sandbox.programs import Outcome
from slime.sandbox.shared import shared_sandbox

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("", "python", "py", "python3")
_TOLERANCE = 1e-6


async def reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0, for the last closed Python block after the thinking; 0.0 without one.

    The label (or `metadata["tests"]`, which goes first) is, also as JSON text, one of

    - `{"inputs": [...], "outputs": [...]}` or `[{"input": ..., "output": ...}, ...]`: what the program
      reads and what it has to write. With `"fn_name"` in the first form: arguments (a list) and result
      of that function, or of that method of a class `Solution`;
    - a list of assert statements, or Python that makes such; if it defines `check(candidate)`,
      `metadata["entry_point"]` names the function that is handed to it.

    The first test that fails is the last that runs. Each has `--sandbox-cpu-s` and `--sandbox-wall-s`.

    Raises:
        BadReward: the label has no tests.
        ConfigError: this machine cannot run programs safely.
    """
    tests = sample.metadata.get("tests")
    tests = _read(label_of(args, sample) if tests is None else tests)
    code = last_program(sample.response)
    if code is None:
        return 0.0
    limits = {"cpu_s": args.sandbox_cpu_s, "wall_s": args.sandbox_wall_s}
    sandbox = shared_sandbox(args)
    if isinstance(tests, str):
        point = sample.metadata.get("entry_point")
        call = f"\ncheck({point})\n" if point and "def check" in tests else ""
        return float((await sandbox.test(code, tests + call, **limits))[0])
    for given, expected in tests:
        result = await sandbox.run(code, stdin=given, **limits)
        if result.outcome is not Outcome.OK or not same_output(result.stdout, expected):
            return 0.0
    return 1.0


def last_program(response: str) -> str | None:
    """The last closed block of Python after the thinking."""
    blocks = _BLOCK.findall(answer_part(response) + "\n")
    programs = [code for language, code in blocks if language.lower() in _PYTHON]
    return programs[-1] if programs else None


def same_output(given: str, expected: str) -> bool:
    """Whether the words agree, line by line; words with a decimal point up to 1e-6 relative."""
    lines = [line.split() for line in given.strip().splitlines()]
    wanted = [line.split() for line in expected.strip().splitlines()]
    return len(lines) == len(wanted) and all(
        len(line) == len(other) and all(map(_same_word, line, other))
        for line, other in zip(lines, wanted, strict=True)
    )


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if not re.fullmatch(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?", expected):
        return False
    try:
        number = float(given)
    except ValueError:
        return False
    return abs(number - float(expected)) <= _TOLERANCE * max(1.0, abs(float(expected)))


def _read(tests: Any) -> str | list[tuple[str, str]]:
    """Tests as Python, or as (input, output) pairs.

    Raises:
        BadReward: neither.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise BadReward("bad_label", f"tests that are no JSON: {error}") from error
    if isinstance(tests, Mapping):
        return _pairs(cast(Mapping[str, Any], tests))
    items = cast(list[Any], tests if isinstance(tests, list) else [])
    if items and all(isinstance(item, str) for item in items):
        tests = "\n".join(items)
    elif items and all(isinstance(item, Mapping) and "output" in item for item in items):
        return [(_text(item.get("input", "")), _text(item["output"])) for item in items]
    # Without one, code that does nothing at all would pass.
    if isinstance(tests, str) and "assert" in tests:
        return tests
    raise BadReward(
        "bad_label", f"no tests: {tests!r:.120}; usage.md has the forms of --rm-type code"
    )


def _pairs(tests: Mapping[str, Any]) -> str | list[tuple[str, str]]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    is_fine = isinstance(inputs, list) and isinstance(outputs, list)
    if not is_fine or not inputs or len(cast(list[Any], inputs)) != len(cast(list[Any], outputs)):
        raise BadReward("bad_label", f"tests want inputs and as many outputs, found {tests!r:.120}")
    pairs = list(zip(cast(list[Any], inputs), cast(list[Any], outputs), strict=True))
    name = tests.get("fn_name")
    if name is None:
        return [(_text(given), _text(expected)) for given, expected in pairs]
    lines = [f"_call = Solution().{name} if 'Solution' in globals() else {name}"]
    lines += [f"assert _call(*{given!r}) == {expected!r}" for given, expected in pairs]
    return "\n".join(lines)


def _text(lines: Any) -> str:
    return "\n".join(map(str, cast(list[Any], lines))) if isinstance(lines, list) else str(lines)
