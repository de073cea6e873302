"""The system calls that a program in the sandbox may make, as a seccomp filter.

An allowlist: whatever is not named fails with EPERM. No call takes a path, so a program has no file
system; none makes a process, a socket with an address, or a namespace; none reaches another process.

Source: seccomp(2); the filter language is the classic BPF of linux/filter.h.
"""

import ctypes
import errno
import os
import platform
import struct

# name: (x86_64, aarch64); None where that architecture has no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "pause": (34, None),
    "pipe": (22, None), "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "recvfrom": (45, 207), "shutdown": (48, 210),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getrusage": (98, 165),
    "getrlimit": (97, 163), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
}  # fmt: skip
# Those that depend on their arguments.
_CLONE, _CLONE3, _KILL, _TGKILL, _SOCKETPAIR, _SENDTO, _PRLIMIT, _FCNTL, _IOCTL = range(9)
_ASKED: dict[int, tuple[int, int]] = {
    _CLONE: (56, 220), _CLONE3: (435, 435), _KILL: (62, 129), _TGKILL: (234, 131),
    _SOCKETPAIR: (53, 199), _SENDTO: (44, 206), _PRLIMIT: (302, 261),
    _FCNTL: (72, 25), _IOCTL: (16, 29),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_IOCTL_COMMANDS = (0x5421, 0x5451)  # FIONBIO, FIOCLEX

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
# What a C library makes threads with: the shared parts, CLONE_THREAD, places of the thread's id; musl
# adds a bit without meaning. Any other flag, such as that of a namespace, is refused.
_THREAD_FLAGS, _OLD_DETACHED = 0x3D0F00, 0x400000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not F_SETOWN with F_SETSIG: by those the
# kernel itself would send SIGKILL to any process of the same user.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
_X32 = 0x40000000
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE = 1, 1, 0xF
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]


def is_known_machine() -> bool:
    """Whether there is a table of system calls for this processor."""
    return platform.machine() in _MACHINES and struct.calcsize("P") == 8


def build_filter(pid: int) -> bytes:
    """The filter of the process `pid`, as an array of struct sock_filter."""
    column, arch = _MACHINES[platform.machine()]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL_PROCESS),  # the same numbers mean other calls elsewhere
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    for number in (numbers[column] for numbers in _ALLOWED.values()):
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # A thread is fine, a process is not. glibc tries clone3, whose flags no filter can read, first.
    flags = [(_LOAD, 0, 0, _low(0)), (_AND, 0, 0, 0xFFFFFFFF ^ _OLD_DETACHED)]
    code += _when(_ASKED[_CLONE][column], [*flags, (_EQUAL, 0, _DENY, _THREAD_FLAGS)])
    code += [(_EQUAL, 0, 1, _ASKED[_CLONE3][column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += _when(_ASKED[_KILL][column], _equals(0, pid))
    code += _when(_ASKED[_TGKILL][column], _equals(0, pid))
    # asyncio wakes itself through a pair. No datagrams: those could be sent to another address.
    pair = [*_equals(0, _AF_UNIX), (_LOAD, 0, 0, _low(1)), (_AND, 0, 0, _SOCK_TYPE)]
    code += _when(_ASKED[_SOCKETPAIR][column], [*pair, (_EQUAL, 0, _DENY, _SOCK_STREAM)])
    code += _when(_ASKED[_SENDTO][column], [*_equals(4, 0), *_high_zero(4)])
    # Limits may be read, those of this process.
    limits = [*_equals(0, 0), *_equals(2, 0), *_high_zero(2)]
    code += _when(_ASKED[_PRLIMIT][column], limits)
    code += _when_one_of(_ASKED[_FCNTL][column], 1, _FCNTL_COMMANDS)
    code += _when_one_of(_ASKED[_IOCTL][column], 1, _IOCTL_COMMANDS)
    code.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install(filter_: bytes) -> None:
    """Put the filter on this thread, for good; it needs PR_SET_NO_NEW_PRIVS.

    Raises:
        OSError: the kernel has no seccomp filters, or they are forbidden here.
    """
    count = len(filter_) // 8
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    program = ctypes.create_string_buffer(struct.pack("@HP", count, ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    arguments = (_MODE_FILTER, ctypes.addressof(program), 0, 0)
    if prctl(_PR_SET_SECCOMP, *(ctypes.c_ulong(value) for value in arguments)) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


_DENY = 0xFF  # to be replaced by the distance to the block's end


def _low(argument: int) -> int:
    return 16 + 8 * argument  # little-endian on both machines


def _equals(argument: int, value: int) -> list[Instruction]:
    return [(_LOAD, 0, 0, _low(argument)), (_EQUAL, 0, _DENY, value)]


def _high_zero(argument: int) -> list[Instruction]:
    return [(_LOAD, 0, 0, _low(argument) + 4), (_EQUAL, 0, _DENY, 0)]


def _when(number: int, conditions: list[Instruction]) -> list[Instruction]:
    """Allow the call `number` if all `conditions` hold, else EPERM; go on for any other."""
    body = [*conditions, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for position, (kind, true, false, value) in enumerate(body):
        if false == _DENY:
            body[position] = (kind, true, len(body) - position - 2, value)
    return [(_EQUAL, 0, len(body), number), *body]


def _when_one_of(number: int, argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow the call `number` with one of `values`, else EPERM; go on for any other."""
    body: list[Instruction] = [(_LOAD, 0, 0, _low(argument))]
    for value in values:
        body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    body.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return [(_EQUAL, 0, len(body), number), *body]
