"""The template: a process with all modules in memory, of which each program gets a copy by fork.

Runs as a script with an empty environment. It sees neither programs nor results: it gets descriptors
by a socket, and tells how each process ended. One JSON object per message:

    {"op": "start", "id", "cpu_s", "memory_bytes", "output_bytes", "wall_s"}, with the descriptors of
        request, stdin, stdout, stderr and, for one of a pair, the socket to the other
    {"op": "kill", "id"}
    -> {"op": "ready", "layers", "missing"} or {"op": "refused", "why"}, once
    -> {"op": "end", "id", "status" (as waitpid has it), "cpu_s", "wall_s", "why": None or "wall", "threads"}
"""

import array
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from slime.sandbox import lockdown, modules, runner, seccomp

MAX_PROGRAMS = 256
_MAX_MESSAGE = 4096
_THREAD_LOOK_S = 0.02
EXIT_UNLOCKED = 96


@dataclass
class _Running:
    id: int
    pid: int
    started: float
    deadline: float
    uid: int | None
    why: str | None = None


class Template:
    """Starts, watches and ends programs until the socket closes."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._running: dict[int, _Running] = {}
        self._wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._users: list[int] | None = None
        self._bytes = 0

    def prepare(self, packages: list[str]) -> None:
        """Load modules, go apart, and prove with a program of its own that the lock holds."""
        if not seccomp.is_known_machine():
            self._refuse(f"the filter knows x86_64 and aarch64, and this is {os.uname().machine}")
        missing = modules.close_folders(packages)
        users = lockdown.own_users(MAX_PROGRAMS)
        layers = ["seccomp", "limits"]
        layers += lockdown.leave_network(may_lose_users=users is None)
        if users is not None:
            layers.append("users")
            self._users = list(users)
        os.chdir("/")
        gc.collect()
        gc.freeze()
        self._bytes = _address_space()
        layers += self._probe()
        self._tell({"op": "ready", "layers": layers, "missing": missing})

    def run(self) -> None:
        """Until the other side is gone."""
        poll = select.poll()  # `select.select` takes no descriptor above 1,023
        poll.register(self._link, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(self._patience_ms())}
            if self._wake in ready:
                os.read(self._wake, 4096)
            self._reap()
            if self._link.fileno() in ready and not self._take():
                return
            self._watch()

    def end(self) -> None:
        """Kill all programs."""
        for item in self._running.values():
            os.kill(item.pid, signal.SIGKILL)

    def _take(self) -> bool:
        room = socket.CMSG_SPACE(8 * array.array("i").itemsize)
        try:
            message, control, _, _ = self._link.recvmsg(_MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        if not message:
            return False
        descriptors = array.array("i")
        for _, _, data in control:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        order = json.loads(message)
        if order["op"] == "kill":
            for item in self._running.values():
                if item.id == order["id"]:
                    os.kill(item.pid, signal.SIGKILL)
            return True
        self._start(order, list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _start(self, order: dict[str, Any], descriptors: list[int]) -> None:
        uid = self._users.pop() if self._users is not None else None
        limits = lockdown.Limits(order["cpu_s"], order["memory_bytes"], order["output_bytes"], uid)
        template = os.getpid()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _be_program(descriptors, limits, template, self._bytes)
        self._running[pid] = _Running(order["id"], pid, started, started + order["wall_s"], uid)

    def _reap(self) -> None:
        for pid in list(self._running):
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if not found:
                continue
            item = self._running.pop(pid)
            if self._users is not None and item.uid is not None:
                self._users.append(item.uid)
            message = {"op": "end", "id": item.id, "status": status, "why": item.why}
            message["cpu_s"] = usage.ru_utime + usage.ru_stime
            message["wall_s"] = time.monotonic() - item.started
            self._tell(message)

    def _watch(self) -> None:
        now = time.monotonic()
        for item in self._running.values():
            if item.why is None and now >= item.deadline:
                item.why = "wall"
            elif (
                item.why is None
                and item.uid is None
                and _num_threads(item.pid) > lockdown.MAX_THREADS
            ):
                item.why = "threads"
            else:
                continue
            os.kill(item.pid, signal.SIGKILL)

    def _patience_ms(self) -> float | None:
        if not self._running:
            return None
        if self._users is None:  # then nothing but this watch bounds a program's threads
            return 1000 * _THREAD_LOOK_S
        soonest = min(item.deadline for item in self._running.values())
        return 1000 * max(soonest - time.monotonic(), 0.0)

    def _probe(self) -> list[str]:
        """Further layers that a process had when it was locked; it must then be able to do nothing."""
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            uid = self._users[-1] if self._users else None
            limits = lockdown.Limits(5, 1 << 28, 1 << 20, uid)
            found = _try_to_escape(limits, os.getppid(), self._bytes)
            os.write(into, json.dumps(found)[:1000].encode())
            os._exit(0)
        os.close(into)
        with os.fdopen(out, "rb") as answer:
            text = answer.read().decode(errors="replace")
        _, status = os.waitpid(pid, 0)
        if status != 0 or not text.startswith("["):
            self._refuse(text or f"the process that tried the lock ended with status {status}")
        return json.loads(text)

    def _refuse(self, why: str) -> None:
        self._tell({"op": "refused", "why": why})
        raise SystemExit(1)

    def _tell(self, message: dict[str, Any]) -> None:
        self._link.send(json.dumps(message).encode())


def _be_program(
    descriptors: list[int], limits: lockdown.Limits, template: int, template_bytes: int
) -> None:
    """In the copy: take the descriptors, lock, run, leave."""
    status = EXIT_UNLOCKED
    try:
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        request, *streams = descriptors
        with os.fdopen(request, "rb") as file:
            file.seek(0)
            order = json.loads(file.read())
        # First above the places they go to, so that none is overwritten before it is copied.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in streams]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place)
        os.closerange(len(streams), 1 << 16)
        runner.prepare()
        lockdown.lock_down(limits, template=template, template_bytes=template_bytes)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the program must not run
        os.write(2, f"the sandbox could not lock itself: {error!r}\n".encode())
        os._exit(status)
    try:
        status = runner.run(order["kind"], order["code"])
    finally:
        os._exit(status)


def _try_to_escape(limits: lockdown.Limits, template: int, template_bytes: int) -> list[str] | str:
    """The further layers of this process, now locked; or in words what it could still do."""
    try:
        landlock = lockdown.lock_down(limits, template=template, template_bytes=template_bytes)
    except OSError as error:
        return str(error)
    attempts = {
        "open a file": lambda: os.open("/proc/self/status", os.O_RDONLY),
        "list a folder": lambda: os.listdir("/"),
        "make a socket": lambda: socket.socket(socket.AF_INET),
        "make a process": os.fork,
        "signal its parent": lambda: os.kill(template, 0),
        "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                continue
        except ValueError:  # setrlimit above the hard limit
            continue
        return f"a locked process could still {name}"
    return ["landlock"] if landlock else []


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _num_threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[17])
    except (OSError, IndexError, ValueError):
        return 0


def main() -> None:
    """`server.py DESCRIPTOR [PACKAGE ...]`."""
    link = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A copy of this process may be ended by nobody but it; it itself goes when its socket closes.
    template = Template(link)
    template.prepare(sys.argv[2:])
    try:
        template.run()
    finally:
        template.end()


if __name__ == "__main__":
    main()
