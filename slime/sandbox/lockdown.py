"""What is taken away from a process before it runs a program of somebody else. There is no way back.

Necessary, everywhere: no new privileges, no capabilities, limits on memory, processor time, files and
output, and the filter of seccomp.py. On top, where the machine has it: a user of its own for each
program, Landlock, namespaces without a network.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass

from slime.sandbox import seccomp

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same on all machines
_MAX_FILES = 32
MAX_THREADS = 32
_FIRST_UID = 1_900_000_000


@dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
        cpu_s: processor seconds.
        memory_bytes: address space on top of the template's.
        output_bytes: of standard output, and of standard error.
        uid: user to become; None: stay.
    """

    cpu_s: int
    memory_bytes: int
    output_bytes: int
    uid: int | None


def lock_down(limits: Limits, *, template: int, template_bytes: int) -> bool:
    """Take all rights from this process, which has one thread, but to compute and to write its output.

    Args:
        template: pid of the parent; this process ends with it.
        template_bytes: its address space.

    Returns:
        Whether Landlock is in force too.

    Raises:
        OSError: a necessary layer cannot be had.
    """
    _set_limits(limits, template_bytes)
    if limits.uid is not None:
        _become(limits.uid)
    _drop_capabilities()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != template:
        os._exit(1)  # it died before the line above
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    has_landlock = close_paths()
    seccomp.install(seccomp.build_filter(os.getpid()))
    return has_landlock


def close_paths() -> bool:
    """Landlock without a single rule: no path, no port, no signal to a process outside; whether it is there."""
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    paths = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    fields = [paths] + ([3] if abi >= 4 else []) + ([3] if abi >= 6 else [])
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields))
    size = ctypes.c_size_t(8 * len(fields))
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return False
    done = _libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def leave_network(*, may_lose_users: bool) -> list[str]:
    """Put this process into namespaces without a network; the names of the layers that it got.

    Args:
        may_lose_users: a user namespace, in which this process can become no other user, is fine.
    """
    apart = os.CLONE_NEWNET | os.CLONE_NEWIPC
    for flags in [apart, apart | os.CLONE_NEWUSER][: 1 + may_lose_users]:
        try:
            os.unshare(flags)
        except OSError:
            continue
        return ["namespaces"]
    return []


def own_users(count: int) -> range | None:
    """Users for `count` programs at a time that nobody else is; None if this process may become no other."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        ends = [int(first) + int(size) for first, _, size in (line.split() for line in lines)]
    first = min(_FIRST_UID, max(ends) - count)
    if first <= 1000:
        return None  # this root is the only user there is
    child = os.fork()
    if child == 0:
        try:
            _become(first)
        except OSError:
            os._exit(1)
        os._exit(0)
    return range(first, first + count) if os.waitpid(child, 0)[1] == 0 else None


def _set_limits(limits: Limits, template_bytes: int) -> None:
    # One second between the soft limit, whose signal a program may catch, and the end.
    bounds = {
        resource.RLIMIT_CPU: (limits.cpu_s, limits.cpu_s + 1),
        resource.RLIMIT_AS: template_bytes + limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.output_bytes,
        resource.RLIMIT_NOFILE: _MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if limits.uid is not None:  # it counts all processes of a user
        bounds[resource.RLIMIT_NPROC] = MAX_THREADS
    for name, bound in bounds.items():
        soft, hard = bound if isinstance(bound, tuple) else (bound, bound)
        resource.setrlimit(name, (soft, hard))


def _become(uid: int) -> None:
    with contextlib.suppress(OSError):  # forbidden in some namespaces; a group opens no path here
        os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    nothing = ctypes.create_string_buffer(24)
    if _libc.syscall(_CAPSET[platform.machine()], header, nothing) != 0:
        raise OSError(ctypes.get_errno(), f"capset: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
