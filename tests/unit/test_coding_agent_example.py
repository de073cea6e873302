"""examples/coding-agent: its shell, its tasks, and the library's agent on a model that writes what a test says."""

import asyncio
import json
import random
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.agent_world import END, agent_world, checked, make_sample, trained_text
from support.fake_engine import Reply

from slime.sandbox.shared import close

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "coding-agent"
sys.path[:0] = [str(EXAMPLE), str(ROOT / "examples" / "quickstart")]

import coder  # noqa: E402
import mbpp_tasks  # noqa: E402
import repairs  # noqa: E402
from shell import Shell  # noqa: E402

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
FILES = {
    "k.py": "def f(x):\n    return max(x) + 6\n",
    "t.py": "from k import f\nprint('ok' if f([1, 2]) == 8 else 'no')\n",
}

# --- the shell ---

COMMANDS = {
    "cat k.py": FILES["k.py"],
    "python t.py": "ok\n",
    "python3 ./t.py && echo yes || echo never": "ok\nyes\n",
    "sed -i s/max/min/ k.py && python t.py": "no\n",
    "sed -i 's/(x) + 6/(x) + 7/' k.py; tail -1 k.py": "    return max(x) + 7\n",
    r"sed -E 's/(m.x)\((.)\)/\2.\1/' k.py | tail -n 1": "    return x.max + 6\n",
    r"sed 's/\(m.x\)/<&\1>/' k.py | grep -c m": "    return <maxmax>(x) + 6\n",
    "sed -n '2p' k.py": "    return max(x) + 6\n",
    "sed 1d k.py": "    return max(x) + 6\n",
    "grep -n 'f(' k.py t.py": "k.py:1:def f(x):\nt.py:2:print('ok' if f([1, 2]) == 8 else 'no')\n",
    "ls -la": "k.py\nt.py\n",
    "cp k.py b.py && mv t.py c.py && rm k.py && ls": "b.py\nc.py\n",
    "echo 'a b' > x; echo \"c'\" >> x; cat x | wc -l; cat -n < x": "2\n     1\ta b\n     2\tc'\n",
    "cat > x <<'EOF'\na $HOME\n\nEOF\ncat x": "a $HOME\n\n",
    "echo a # not this\n# nor this\necho b; # nor this": "a\nb\n",
    "cat no.py && echo never": "cat: no.py: No such file\n",
    "cat no.py 2>/dev/null || echo gone": "gone\n",
    'python3 -c "import sys\nprint(sys.argv)\nsys.exit(3)" a || echo failed': "['-c', 'a']\nfailed\n",
    "python3 - <<EOF\nprint(input())\nEOF\n": "Traceback (most recent call last):\n"
    '  File "<stdin>", line 1, in <module>\nEOFError: EOF when reading a line\n',
    "echo 5 | python3 -c 'print(int(input()) + 1)'": "6\n",
    "python3 -c 'with open(\"n\", \"a\") as f: f.write(\"1\")\nprint(open(\"n\").read())'": "1\n",
    "python3 -c 'open(\"/etc/passwd\")'": "FileNotFoundError",
    "echo $HOME": "sh: there are no variables and no $(...) here\n",
    "echo 'open": "sh: cannot read \"'open\"\n",
    "cat <<EOF\nno end": "sh: the here-document has no end EOF\n",
    "ls | | ls": "sh: nothing stands before |\n",
    "vim k.py": "vim: no such command here",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shell_does_what_a_shell_would(command: str) -> None:
    output, _ = Shell(FILES).run(command.replace("| grep -c m", "| tail -1"))
    expected = COMMANDS[command]
    assert output == expected if expected.endswith("\n") else expected in output


def test_a_program_leaves_nothing_behind_but_its_files() -> None:
    shell = Shell(FILES)
    before = set(sys.modules), sys.stdin, sys.argv, open
    shell.run('echo \'import k; open("o", "w").write("1"); k.f = 0\' > p.py; python p.py')
    assert (set(sys.modules), sys.stdin, sys.argv, open) == before
    assert shell.files["o"] == "1"
    assert shell.run("python t.py") == ("ok\n", 0)
    assert Shell(FILES).run("python3 -c 'import sys; sys.exit(3)'") == ("", 3)
    assert Shell(FILES).run("cat no") == ("cat: no: No such file\n", 1)


# --- the tasks ---


def test_each_repair_has_one_answer_and_its_tests_know_it() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        tasks = repairs.repairs(rng, held_out=held_out)
        for task in (next(tasks) for _ in range(20)):
            told = repairs.row(task, rng)["metadata"]
            passes: list[str] = []
            for call in repairs.CALLS:
                fixed = told["files"] | {task.file: task.source(call)}
                names: dict[str, Any] = {}
                exec(task.source(call), names)
                try:
                    exec(told["tests"], names)
                except AssertionError:
                    assert Shell(fixed).run("python t.py") == ("no\n", 0)
                else:
                    assert Shell(fixed).run("python t.py") == ("ok\n", 0)
                    passes.append(call)
            assert passes == [task.right]
            assert task.is_held_out == held_out


def test_demonstrations_say_what_the_shell_says() -> None:
    rng = random.Random(1)
    tasks = repairs.repairs(rng, held_out=False)
    solved = 0
    for task in (next(tasks) for _ in range(50)):
        shell = Shell(repairs.row(task, rng)["metadata"]["files"])
        messages = repairs.demonstration(task, rng)[2:]
        for answer, told in zip(messages[:-1:2], messages[1::2], strict=True):
            command = answer["content"].removeprefix(repairs.OPEN).removesuffix(repairs.CLOSE)
            assert (shell.run(command)[0].strip() or "-") == told["content"]
        solved += shell.files[task.file] == task.source(task.right)
    assert 8 < solved < 28  # 0.37 of them


def test_problems_of_mbpp_become_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = ["assert f(1)", "assert f(2)"]
    row = mbpp_tasks.row({"prompt": "Add.", "test_imports": ["import math"], "test_list": tests})
    assert row is not None
    assert row["prompt"][0]["content"] == "Write solution.py: Add.\nFor example:\nassert f(1)"
    assert row["metadata"]["tests"] == "import math\nassert f(1)\nassert f(2)\n"
    assert mbpp_tasks.row({"prompt": "Add.", "test_list": tests[:1]}) is None
    source = tmp_path / "mbpp.jsonl"
    with source.open("w") as lines:
        for n in range(40):
            problem = {
                "text": "Add.",
                "test_setup_code": "",
                "test_list": [f"assert g({n})", "g()"],
            }
            lines.write(json.dumps(problem) + "\n")
    monkeypatch.setattr(sys, "argv", ["mbpp_tasks.py", str(source), str(tmp_path)])
    mbpp_tasks.main()
    written = [tmp_path / f"{name}.jsonl" for name in ("train", "held_out")]
    sizes = [len(path.read_text().splitlines()) for path in written]
    assert sum(sizes) == 40
    assert min(sizes) > 0


# --- the agent ---

CAT, LOOP = "cat k.py", "python3 -c 'while True: pass'"
FIX = "sed -i s/max/min/ k.py"
ESCAPE = "python3 -c 'import os; os.write(1, b\"x\" * 9)'"


def said(command: str) -> str:
    return f"I try.\n```mswea_bash_command\n{command}\n```{END}"


@pytest.fixture(autouse=True)
async def sandbox_ends() -> AsyncIterator[None]:
    yield
    close()


async def episode(
    folder: Path, answers: Sequence[str], **more: Any
) -> tuple[float, Any, list[str]]:
    """The reward, the sample, and the prompts that the engine got."""
    settings = yaml.safe_load((EXAMPLE / more.pop("settings", "tiny.yaml")).read_text())
    limits = {"sandbox_cpu_s": 1, "sandbox_wall_s": 10.0, "sandbox_programs": 2, "sandbox_memory_mb": 256,
              "sandbox_output_kb": 64, "sandbox_packages": []}  # fmt: skip
    metadata = {"files": FILES, "module": "k.py", "tests": "assert f([3, 1]) == 7\n"}
    sample = make_sample(metadata=metadata)
    sample.prompt = [{"role": "user", "content": "k.py"}]
    async with agent_world(folder, answers, sample=sample, **limits, **settings, **more) as world:
        reward = await coder.run_coder(world.session, sample)
        (found,) = checked(world.session.samples())
        trained = trained_text(found, world.tokenizer)
        assert trained == "".join(answers[: len(world.engine.requests)])
        return reward, found, world.prompts()


@ON_LINUX
async def test_the_agent_repairs_the_file_and_the_hidden_tests_pay(tmp_path: Path) -> None:
    answers = [said(CAT), said(f"{FIX} && python t.py"), said(repairs.SUBMIT)]
    reward, sample, prompts = await episode(tmp_path, answers)
    assert reward == 1.0
    assert (sample.metadata["exit_status"], sample.metadata["steps"]) == ("Submitted", 3)
    assert FILES["k.py"].strip() in prompts[1]
    assert "<|im_start|>user\nno<|im_end|>" in prompts[2]  # the visible test knows another function


@ON_LINUX
@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([said(CAT), said(repairs.SUBMIT)], "Submitted"),  # nothing was repaired
        ([said("rm k.py"), said(repairs.SUBMIT)], "Submitted"),
        ([said(FIX), f"I am done.{END}"], "RepeatedFormatError"),
        ([said(CAT)] * 9, "LimitsExceeded"),
    ],
)
async def test_no_reward(tmp_path: Path, answers: list[str], status: str) -> None:
    reward, sample, _ = await episode(tmp_path, answers)
    assert reward == 0.0
    assert sample.metadata["exit_status"] == status


@ON_LINUX
async def test_an_answer_without_room_ends_the_episode(tmp_path: Path) -> None:
    answers = [said(CAT), said(CAT)]
    reward, sample, prompts = await episode(tmp_path, answers, rollout_max_response_len=80)
    assert reward == 0.0
    assert sample.metadata["exit_status"] == "LimitsExceeded"
    assert len(prompts) == 1


@ON_LINUX
async def test_what_a_command_does_to_the_shell_is_told_and_the_episode_goes_on(
    tmp_path: Path,
) -> None:
    half = said("python3 -c 'print(chr(0xd800))'")
    answers = [said(LOOP), said(ESCAPE), "no action" + END, half, said(FIX), said(repairs.SUBMIT)]
    reward, _, prompts = await episode(tmp_path, answers, settings="coder-qwen3.yaml")
    assert reward == 1.0
    assert "the command was ended: timeout" in prompts[1]
    assert "the command was ended: ok" in prompts[2]
    assert "Expected exactly 1 action, found 0." in prompts[3]
    assert prompts[3].startswith(prompts[2])  # one conversation, no branch
    assert "exit code 0\n?\n" in prompts[4]
    assert "Files here: k.py, t.py." in prompts[0]


async def test_an_execution_that_is_cut_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, run_once = threading.Event(), coder.DefaultAgent.run

    def run(self: Any, task: str = "", **kwargs: Any) -> dict[str, Any]:
        try:
            return run_once(self, task, **kwargs)
        finally:
            ended.set()

    monkeypatch.setattr(coder.DefaultAgent, "run", run)
    settings = yaml.safe_load((EXAMPLE / "tiny.yaml").read_text())
    sample = make_sample(metadata={"files": FILES, "module": "k.py", "tests": ""})
    async with agent_world(tmp_path, [Reply(hold=True)], sample=sample, **settings) as world:
        task = asyncio.create_task(coder.run_coder(world.session, sample))
        await world.engine.holds(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await asyncio.to_thread(ended.wait, 30)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"files": [], "output": "", "returncode": 0}', "[" * 100_000,
     '{"files": {"a": 1}, "output": "", "returncode": 0}',
     '{"files": {}, "output": 1, "returncode": 0}', '{"files": {}, "output": "", "returncode": "0"}',
     json.dumps({"files": {"a": "x" * 100_000}, "output": "", "returncode": 0})],
)  # fmt: skip
def test_a_reply_that_the_shell_would_not_write_is_none(text: str) -> None:
    assert coder._reply(text) is None
