"""Ports, the run's folder and disk space: what a run takes of this machine."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from slime.check.model import ModelFacts
from slime.check.plan import Plan
from slime.config.config import Config, slime_options
from slime.config.engine_rules import external_urls
from slime.config.problems import Problems

FreeBytes = Callable[[Path], int]
_LOOPBACK = "127.0.0.1"
_CONNECT_TIMEOUT_S = 0.3


@dataclass(frozen=True)
class DiskFacts:
    """Bytes that a run writes, nearly; None when the model's size is not known."""

    one_checkpoint: int | None
    one_hf_folder: int | None
    total: int | None
    free: int | None


def free_disk_bytes(folder: Path) -> int:
    """Bytes that this user can still write below the folder."""
    return shutil.disk_usage(folder).free


def check_ports(config: Config, problems: Problems) -> None:
    """Note ports that somebody else has, and a router or engines that should be there and are not."""
    view = problems.readable(config)
    with problems.caught():
        if view.debug_train_only:
            return
        host, port = view.sglang_router_ip, view.sglang_router_port
        if host is not None and port is not None and not _answers(host, port):
            problems.add(
                f"--sglang-router-ip {host} --sglang-router-port {port}: nobody answers there; "
                "start that router first, or leave both flags out and the run starts its own"
            )
        for url in external_urls(view):
            parts = urlsplit(url)
            if not _answers(parts.hostname or "", parts.port or 80):
                problems.add(
                    f"--rollout-external-engine-addrs: nobody answers at {url}; start that engine first"
                )
        for flag, number in _own_ports(view):
            if reason := _why_taken(number):
                problems.add(
                    f"{flag} {number}: {reason}; give a free one, or leave the flag out and a free "
                    "one is taken"
                )


def _own_ports(config: Config) -> list[tuple[str, int]]:
    """Ports that the run will listen on, as far as flags name them."""
    ports: list[tuple[str, int]] = []
    for option in slime_options():
        if option.dest.endswith("_port") and option.type_name == "int":
            is_adopted = option.dest == "sglang_router_port" and config.sglang_router_ip is not None
            number: int | None = getattr(config, option.dest)
            if number and not is_adopted:
                ports.append((option.name, number))
    if number := config.router_argv.get("prometheus_port"):
        ports.append(("--router-prometheus-port", int(number)))
    return ports


def _why_taken(port: int) -> str | None:
    if not 0 < port < 65536:
        return "a port is a number from 1 to 65535"
    with socket.socket() as probe:
        # Without it a port counts as taken for a minute after its last user.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as error:
            is_busy = error.errno == errno.EADDRINUSE
            return "another process listens on it" if is_busy else str(error.strerror)
    return None


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def check_run_folder(config: Config, problems: Problems) -> None:
    """Note a folder that a live run has, or that this user cannot write to."""
    view = problems.readable(config)
    with problems.caught():
        if view.run_dir is not None and (owner := _lock_owner(Path(view.run_dir) / "run.lock")):
            problems.add(
                f"--run-dir {view.run_dir} is in use by {owner}. Two runs in one folder would mix "
                "their metrics and checkpoints: wait for it to end, or give another --run-dir"
            )
    with problems.caught():
        folders = {"--run-dir": view.run_dir or "runs", "--save": view.save}
        if view.save_hf is not None:
            folders["--save-hf"] = str(Path(view.save_hf.partition("{")[0]).parent)
        for flag, folder in folders.items():
            if folder is None:
                continue
            there = nearest_existing(Path(folder))
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                problems.add(
                    f"{flag} {folder}: this user cannot write in {there}; give another folder"
                )


def _lock_owner(lock: Path) -> str | None:
    """Who holds a run's lock. A lock that is free is left alone wherever the kernel tells so."""
    try:
        with lock.open("rb") as file:
            owner = file.read(1000).decode(errors="replace").strip()
            # The kernel's list tells of this host alone, and numbers of files repeat between disks.
            is_local = owner.endswith(f" on {socket.gethostname()}")
            if is_local and _is_listed(os.fstat(file.fileno()).st_ino) is False:
                return None
            return (owner or "another process") if _is_held(file.fileno()) else None
    except OSError:
        return None  # no such file: nobody has been here


def _is_listed(inode: int) -> bool | None:
    """Whether the kernel lists a lock on the file; None where it keeps no list."""
    try:
        rows = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    fields = [row.split() for row in rows]
    return any(
        "FLOCK" in words and any(word.endswith(f":{inode}") for word in words) for words in fields
    )


def _is_held(descriptor: int) -> bool:
    """Whether a share of the lock is refused; one that is given is given back at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def check_disk(
    config: Config,
    model: ModelFacts | None,
    plan: Plan,
    problems: Problems,
    *,
    free_bytes: FreeBytes,
) -> DiskFacts:
    """What the checkpoints take; a disk that is too small for all of them is noted."""
    if config.save is None or not plan.saves or model is None:
        return DiskFacts(None, None, None, None)
    one = model.checkpoint_bytes(with_optimizer=not config.no_save_optim)
    hf = model.hf_bytes() if config.save_hf is not None else 0
    there = nearest_existing(Path(config.save))
    free = free_bytes(there)
    if one is None or hf is None:
        return DiskFacts(one, hf, None, free)
    num_hf = len(plan.saves) if "{rollout_id" in (config.save_hf or "") else 1
    total = one * len(plan.saves) + hf * num_hf
    if total > free:
        several = f"{len(plan.saves)} checkpoint(s) of {gigabytes(one)}"
        several += f" and {num_hf} Hugging Face folder(s) of {gigabytes(hf)}" if hf else ""
        problems.add(
            f"--save {config.save}: {several} need {gigabytes(total)}, and {gigabytes(free)} are "
            f"free in {there}; raise --save-interval, give --no-save-optim or a larger disk"
        )
    return DiskFacts(one, hf if config.save_hf is not None else None, total, free)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def gigabytes(count: float) -> str:
    """`3.9 MB`: bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
