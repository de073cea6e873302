"""Programs that try to get out, to stay, or to use up the machine; each must fail, and harm no other."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.sandbox.programs import Outcome
from slime.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

DRIVER = Path(__file__).parents[2] / "support" / "sandbox_driver.py"
SECRET = "secret-of-the-run"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(max_programs=4, memory_bytes=256 << 20).start()
    yield box
    box.close()


# What is tried, as an expression; it must raise OSError.
REFUSED = {
    "read a file": "open('/etc/passwd').read()",
    "read through the current folder": "open('etc/passwd').read()",
    "read through /proc/self/root": "open('/'.join(['/proc/self', 'root', 'etc', 'passwd'])).read()",
    "list a folder": "os.listdir('/')",
    "ask whether a file is there": "os.stat('/etc/passwd')",
    "read the environment of the parent": "open(f'/proc/{os.getppid()}/environ').read()",
    "read the memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "write a file": "open(os.path.expanduser('~/x'), 'w')",
    "write a temporary file": "open('/tmp/x', 'w')",
    "make a folder": "os.mkdir('/tmp/x')",
    "make a link to follow later": "os.symlink('/etc/passwd', '/tmp/x')",
    "make a hard link": "os.link('/etc/passwd', '/tmp/x')",
    "read a link": "os.readlink('/proc/self/exe')",
    "rename": "os.rename('/etc/hostname', '/tmp/x')",
    "remove": "os.remove('/etc/hostname')",
    "change a mode": "os.chmod('/etc/hostname', 0o777)",
    "change its root": "os.chroot('/')",
    "change its folder": "os.chdir('/etc')",
    "make a named pipe": "os.mkfifo('/tmp/x')",
    "make a file in memory": "os.memfd_create('x')",
    "connect": "socket.create_connection(('127.0.0.1', 80))",
    "make an internet socket": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "make a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "make a local socket": "socket.socket(socket.AF_UNIX)",
    "make a pair of datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "send to an address": "socket.socketpair()[0].sendto(b'x', '/run/x')",
    "send descriptors": "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",
    "make a process": "os.fork()",
    "run a command": "subprocess.run(['/bin/true'])",
    "run a shell": "subprocess.check_output('id', shell=True)",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "replace itself": "os.execv('/bin/true', ['true'])",
    "signal the parent": "os.kill(os.getppid(), 9)",
    "signal everybody": "os.kill(-1, 9)",
    "signal its group": "os.killpg(0, 9)",
    "leave its session": "os.setsid()",
    "become root": "os.setuid(0)",
    "limit the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "run on other processors": "os.sched_setaffinity(os.getppid(), {0})",
    "go before others": "os.nice(-5)",
    "own the signals of a pipe": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "choose such a signal": "fcntl.fcntl(0, 10, 9)",
    "grow a pipe": "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "type into the terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "seal its output": "fcntl.fcntl(1, 1033, 1)",
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED.keys())
async def test_python_cannot(sandbox: Sandbox, attempt: str) -> None:
    code = f"""
import fcntl, os, resource, socket, subprocess
try:
    {attempt}
except OSError as error:
    print(type(error).__name__)
"""
    result = await sandbox.run(code)
    assert result.stdout == "PermissionError\n", result


# Calls by number, past Python and the C library: name -> (x86_64, aarch64, arguments).
CALLS = {
    "openat": (257, 56, "-100, b'/etc/passwd', 0"),
    "openat2": (437, 437, "-100, b'/etc/passwd', bytes(24), 24"),
    "newfstatat": (262, 79, "-100, b'/etc/passwd', bytes(144), 0"),
    "statx": (332, 291, "-100, b'/etc/passwd', 0, 4095, bytes(256)"),
    "socket": (41, 198, "2, 1, 0"),
    "io_uring_setup": (425, 425, "4, bytes(256)"),
    "userfaultfd": (323, 282, "0"),
    "mount": (165, 40, "b'none', b'/tmp', b'tmpfs', 0, 0"),
    "fsopen": (430, 430, "b'tmpfs', 0"),
    "unshare": (272, 97, "0x10000000"),
    "setns": (308, 268, "0, 0"),
    "ptrace": (101, 117, "16, os.getppid(), 0, 0"),
    "process_vm_readv": (310, 270, "os.getppid(), 0, 0, 0, 0, 0"),
    "pidfd_open": (434, 434, "os.getppid(), 0"),
    "pidfd_getfd": (438, 438, "0, 0, 0"),
    "tgkill": (234, 131, "os.getppid(), os.getppid(), 9"),
    "tkill": (200, 130, "os.getppid(), 9"),
    "rt_sigqueueinfo": (129, 138, "os.getppid(), 9, bytes(128)"),
    "bpf": (321, 280, "0, 0, 0"),
    "perf_event_open": (298, 241, "bytes(128), 0, -1, -1, 0"),
    "keyctl": (250, 219, "0, 0, 0, 0, 0"),
    "execveat": (322, 281, "-100, b'/bin/true', 0, 0, 0"),
    "open_by_handle_at": (304, 265, "-100, bytes(64), 0"),
    "name_to_handle_at": (303, 264, "-100, b'/etc', bytes(64), bytes(8), 0"),
    "memfd_secret": (447, 447, "0"),
    "shmget": (29, 194, "1, 4096, 0o1666"),
    "msgget": (68, 186, "1, 0o1666"),
    "mq_open": (240, 180, "b'x', 0o102, 0o666, 0"),
    "kcmp": (312, 272, "os.getpid(), os.getppid(), 0, 0, 0"),
    "seccomp": (317, 277, "1, 0, bytes(16)"),
    "prctl": (157, 167, "1, 0, 0, 0, 0"),
    "capset": (126, 91, "bytes(8), bytes(24)"),
    "setrlimit": (160, 164, "0, bytes(16)"),
    "prlimit64": (302, 261, "0, 0, bytes(16), 0"),
    "clone": (56, 220, "17, 0, 0, 0, 0"),
    "clone of a namespace": (56, 220, "0x3d0f00 | 0x20000000, 0, 0, 0, 0"),
    "sendmsg": (46, 211, "0, bytes(56), 0"),
    "splice": (275, 76, "0, 0, 1, 0, 1, 0"),
    "ftruncate": (77, 46, "1, 0"),
    "fallocate": (285, 47, "1, 0, 0, 4096"),
    "getdents64": (217, 61, "0, bytes(256), 256"),
    "reboot": (169, 142, "0, 0, 0, 0"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_system_call_by_its_number_is_refused(
    sandbox: Sandbox, call: tuple[int, int, str]
) -> None:
    number = call[os.uname().machine == "aarch64"]
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall({number}, {call[2]}), ctypes.get_errno())
"""
    result = await sandbox.run(code)
    assert result.stdout == "-1 1\n", result


async def test_clone3_is_not_there_so_that_threads_are_made_by_clone(sandbox: Sandbox) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(435, bytes(88), 88), ctypes.get_errno())
"""
    assert (await sandbox.run(code)).stdout == "-1 38\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other numbers exist on x86_64 alone")
async def test_calls_of_another_architecture_end_the_program(sandbox: Sandbox) -> None:
    x32 = "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 2, b'/etc/passwd', 0)\nprint('?')"
    result = await sandbox.run(x32)
    assert (result.stdout, result.exit_code) == ("", -signal.SIGSYS)
    # int 0x80: open of the 32-bit kernel interface, from memory that the program made executable.
    i386 = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b805000000" "cd80" "c3"))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print("?")
"""
    result = await sandbox.run(i386)
    assert (result.stdout, result.exit_code) == ("", -signal.SIGSYS)


async def test_no_descriptor_of_the_host_is_open(sandbox: Sandbox) -> None:
    code = """
import os
open_ones = []
for number in range(1024):
    try:
        os.lseek(number, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == 9:
            continue
    open_ones.append(number)
print(open_ones)
"""
    assert (await sandbox.run(code)).stdout == "[0, 1, 2]\n"


async def test_nothing_of_the_run_is_in_the_environment_or_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLIME_API_KEY", SECRET)
    box = Sandbox(max_programs=1)
    try:
        await box.run("pass", stdin="what another program was given")
        result = await box.run(
            "import gc, os\nprint(dict(os.environ))\n"
            "print([o for o in gc.get_objects() if ''.join(reversed('saw margorp')) in repr(o)][:1])\n"
        )
    finally:
        box.close()
    assert SECRET not in result.stdout
    assert "SLIME" not in result.stdout
    assert result.stdout.endswith("[]\n")


async def test_programs_cannot_see_or_stop_each_other(sandbox: Sandbox) -> None:
    victim = asyncio.ensure_future(sandbox.run("import time\ntime.sleep(1)\nprint('alive')"))
    await asyncio.sleep(0.3)
    attack = """
import os
for pid in range(max(2, os.getpid() - 200), os.getpid()):
    try:
        os.kill(pid, 9)
        print("killed", pid)
    except PermissionError:
        pass
"""
    assert (await sandbox.run(attack)).stdout == ""
    assert (await victim).stdout == "alive\n"


HUNGRY = {
    "loop": ("while True: pass", Outcome.TIMEOUT),
    "loop in C": ("9 ** 9 ** 9 % 7", Outcome.TIMEOUT),
    "sleep": ("import time\ntime.sleep(60)", Outcome.TIMEOUT),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", Outcome.TIMEOUT),
    "ignore signals": (
        "import signal\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        Outcome.TIMEOUT,
    ),
    "memory": ("data = []\nwhile True: data.append(bytearray(1 << 26))", Outcome.MEMORY),
    "memory at once": ("bytearray(1 << 40)", Outcome.MEMORY),
    "memory shared": (
        "import mmap\npages = []\nwhile True: pages.append(mmap.mmap(-1, 1 << 24))",
        Outcome.ERROR,
    ),
    "output": ("while True: print('x' * 1000)", Outcome.OUTPUT),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", Outcome.OUTPUT),
    "output at an offset": ("import os\nos.pwrite(1, b'x', 1 << 40)", Outcome.ERROR),
    "threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        Outcome.ERROR,
    ),
    "descriptors": ("import os\nwhile True: os.pipe()", Outcome.ERROR),
    "stack": ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", None),
    "stack of C": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
        "    def __repr__(self): return repr([self])\nrepr(A())",
        None,
    ),
    "crash": ("import ctypes\nctypes.string_at(0)", Outcome.ERROR),
}


@pytest.mark.parametrize(("code", "outcome"), HUNGRY.values(), ids=HUNGRY.keys())
async def test_a_program_that_takes_all_ends_and_the_next_one_runs(
    sandbox: Sandbox, code: str, outcome: Outcome | None
) -> None:
    # What comes to an end by itself does so late on a busy machine.
    wall_s = 2 if outcome is Outcome.TIMEOUT else 8
    result = await sandbox.run(code, cpu_s=1, wall_s=wall_s)
    assert result.outcome is not Outcome.OK
    if outcome is not None:
        assert result.outcome is outcome, result.stderr[-300:]
    assert len(result.stdout) <= 256 << 10
    assert result.seconds < 10
    assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_nothing_stays_behind(sandbox: Sandbox) -> None:
    await sandbox.run(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    assert sandbox._process is not None
    assert _children(sandbox._process.pid) == ""


def test_programs_end_with_the_template_and_the_template_with_its_owner() -> None:
    code = (
        "import asyncio, os\n"
        "from slime.sandbox.sandbox import Sandbox\n"
        "async def main():\n"
        "    box = Sandbox().start()\n"
        "    task = asyncio.create_task(box.run('import time\\ntime.sleep(60)', wall_s=60))\n"
        "    await asyncio.sleep(0.3)\n"
        "    print(box._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())"
    )
    owner = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    template = int(owner.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{template}").exists() and _state(template) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


THREADS = (
    "import threading, time\n"
    "for _ in range(1000): threading.Thread(target=time.sleep, args=(5,)).start()\n"
)


def test_an_ordinary_user_without_namespaces_is_as_safe() -> None:
    """One user only and no further namespaces: what a container gives that allows neither."""
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0:
        pytest.skip("user namespaces are forbidden here")
    programs = [
        "print(1)",
        "open('/etc/passwd')",
        "import os\nos.kill(os.getppid(), 9)",
        "import socket\nsocket.socket()",
        "import os\nos.fork()",
        THREADS,
        "print(2)",
    ]
    forbid = "for n in user net ipc mnt pid; do echo 0 >/proc/sys/user/max_${n}_namespaces; done; "
    run = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", f'{forbid} exec "$0" "$@"', sys.executable, DRIVER, "run"],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert set(told["layers"]) <= {"seccomp", "limits", "landlock"}
    outcomes = [outcome for outcome, _, _ in told["results"]]
    assert outcomes == ["ok", "error", "error", "error", "error", "threads", "ok"]
    assert all("PermissionError" in error for _, _, error in told["results"][1:5])


def test_without_seccomp_nothing_runs() -> None:
    run = subprocess.run(
        [sys.executable, DRIVER, "without-seccomp"], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    error = json.loads(run.stdout)["error"]
    assert "cannot run a model's programs safely" in error
    assert "take a reward without programs" in error


def test_the_host_has_a_socket_that_programs_could_have_reached() -> None:
    """The attempts above fail for the sandbox, not for want of a network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
