import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from slime.errors import ConfigError, SandboxError
from slime.sandbox.programs import Outcome
from slime.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(max_programs=2).start()
    yield box
    box.close()


async def test_a_program_reads_its_input_and_writes_its_output(sandbox: Sandbox) -> None:
    result = await sandbox.run(
        "import sys\nprint(sum(int(n) for n in sys.stdin))\nsys.stderr.write('é\\n')",
        stdin="1\n2\n3",
    )
    assert (result.stdout, result.stderr, result.outcome) == ("6\n", "é\n", Outcome.OK)
    assert 0 < result.cpu_s < result.seconds + 0.05 < 5


@pytest.mark.parametrize(
    ("code", "outcome", "exit_code"),
    [
        ("import sys\nsys.exit()", Outcome.OK, 0),
        ("import sys\nsys.exit(3)", Outcome.ERROR, 3),
        ("import sys\nsys.exit('no')", Outcome.ERROR, 1),
        ("1 / 0", Outcome.ERROR, 1),
        ("def", Outcome.ERROR, 1),
        ("\0", Outcome.ERROR, 1),
        ("raise KeyboardInterrupt", Outcome.ERROR, 1),
        ("import os\nos.kill(os.getpid(), 15)", Outcome.ERROR, -signal.SIGTERM),
        ("import sys\nsys.stdout = None", Outcome.ERROR, 1),
    ],
)
async def test_how_a_program_ends(
    sandbox: Sandbox, code: str, outcome: Outcome, exit_code: int
) -> None:
    result = await sandbox.run(code)
    assert (result.outcome, result.exit_code) == (outcome, exit_code)


async def test_an_error_shows_the_line_of_the_program_and_nothing_of_the_sandbox(
    sandbox: Sandbox,
) -> None:
    result = await sandbox.run("def half(n):\n    return n / 0\n\nhalf(3)")
    assert result.stderr == (
        "Traceback (most recent call last):\n"
        '  File "<program>", line 4, in <module>\n    half(3)\n'
        '  File "<program>", line 2, in half\n    return n / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\n\nasync def say(): print('1')\n\nasyncio.run(say())",
        "import io, os\nprint(io.BytesIO(os.read(0, os.fstat(0).st_size)).readline().decode())",
        "from concurrent.futures import ThreadPoolExecutor as P\nprint(*P(4).map(int, input()))",
        "import sys, threading\nthreading.stack_size(1 << 26)\n"
        "t = threading.Thread(target=lambda: print(input()))\nt.start()\nt.join()",
        "import threading\nthreading.Thread(target=lambda: print(1)).start()",
        "import atexit\natexit.register(print, 1)",
        "print(open(0).read())",
        "import fractions, statistics, zlib, hashlib, ctypes, decimal, lzma, uuid, csv\nprint(1)",
        "import dataclasses, typing, re, heapq, bisect, itertools, xml.dom.minidom, doctest\nprint(1)",
        "print(__name__ == '__main__' and 1)",
    ],
)
async def test_what_programs_usually_do_works(sandbox: Sandbox, code: str) -> None:
    result = await sandbox.run(code, stdin="1")
    assert result.stdout == "1\n", result.stderr


async def test_a_set_is_printed_in_the_same_order_each_time(sandbox: Sandbox) -> None:
    code = "print(set('abcdefghij'))"
    other = Sandbox(max_programs=1)
    try:
        assert (await other.run(code)).stdout == (await sandbox.run(code)).stdout
    finally:
        other.close()


async def test_chance_is_another_in_each_program(sandbox: Sandbox) -> None:
    code = "import random\nprint(random.random())"
    assert (await sandbox.run(code)).stdout != (await sandbox.run(code)).stdout


async def test_only_so_many_run_at_a_time_and_waiting_costs_no_seconds(sandbox: Sandbox) -> None:
    started = time.monotonic()
    results = await asyncio.gather(
        *(sandbox.run("import time\ntime.sleep(0.3)", wall_s=1) for _ in range(8))
    )
    assert time.monotonic() - started > 1.1
    assert all(result.outcome is Outcome.OK for result in results)


async def test_a_cancelled_program_ends_and_gives_up_its_place(sandbox: Sandbox) -> None:
    tasks = [
        asyncio.create_task(sandbox.run("while True: pass", cpu_s=60, wall_s=60)) for _ in "abc"
    ]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert (await asyncio.wait_for(sandbox.run("print(1)"), 10)).stdout == "1\n"
    async with asyncio.timeout(10):
        while sandbox._running:  # noqa: ASYNC110 - the others are told to end, and do so when they get a processor
            await asyncio.sleep(0.01)


def test_one_sandbox_serves_several_event_loops(sandbox: Sandbox) -> None:
    for _ in range(2):
        assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"


async def test_a_sandbox_that_died_fails_what_ran_and_starts_again() -> None:
    box = Sandbox(max_programs=1)
    try:
        await box.run("pass")
        running = [asyncio.create_task(box.run("import time\ntime.sleep(60)")) for _ in "ab"]
        await asyncio.sleep(0.2)
        assert box._process is not None
        os.kill(box._process.pid, signal.SIGKILL)
        for task in running:
            with pytest.raises(SandboxError, match="died while the program ran"):
                await task
        assert (await box.run("print(1)")).stdout == "1\n"
    finally:
        box.close()


async def test_packages_are_there_when_asked_for_and_refused_when_missing() -> None:
    box = Sandbox(max_programs=1, packages=["mpmath"])
    try:
        result = await box.run("import mpmath.calculus.quadrature\nprint(mpmath.mpf(1))")
        assert result.stdout == "1.0\n", result.stderr
        assert (await box.run("import numpy")).outcome is Outcome.ERROR
    finally:
        box.close()
    with pytest.raises(ConfigError, match="no_such_package"):
        await Sandbox(packages=["no_such_package"]).run("pass")


async def test_no_descriptor_is_left_open(sandbox: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))
    await asyncio.gather(*(sandbox.run("pass") for _ in range(20)))
    await sandbox.test("x = 1", "assert x == 1")
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_it_starts_in_a_process_with_a_thousand_open_descriptors() -> None:
    wanted = 1200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * wanted:
        pytest.skip(f"this machine allows a process {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * wanted), hard))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(wanted)]
    box = Sandbox(max_programs=1)
    try:
        result = await asyncio.wait_for(box.run("print(1)"), 60)
        assert result.stdout == "1\n"
    finally:
        box.close()
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_program_that_comes_just_after_the_death_is_told() -> None:
    box = Sandbox(max_programs=1)
    await box.run("pass")
    started = box.start
    # What a death between the start and the program leaves.
    box.start = lambda: (started(), box.close())[0]  # pyright: ignore[reportAttributeAccessIssue]
    box.close()
    with pytest.raises(SandboxError, match="before it took the program"):
        await asyncio.wait_for(box.run("pass"), 60)


async def test_a_message_that_cannot_be_read_fails_what_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box = Sandbox(max_programs=2)
    await box.run("pass")

    def broken(_: object) -> None:
        raise ValueError("this test breaks it")

    monkeypatch.setattr(box, "_take", broken)
    with pytest.raises(SandboxError, match="died while the program ran"):
        await asyncio.wait_for(asyncio.gather(box.run("pass"), box.run("pass")), 60)
    assert "this test breaks it" in caplog.text
    monkeypatch.undo()
    assert (await box.run("print(1)")).stdout == "1\n"
    box.close()
