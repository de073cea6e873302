"""The hang doctor: every process of a run can be asked for its stacks and whom it waits for.

Each process says where it is in `RUN/processes/{role}.json` and answers SIGUSR1 with the stacks of
all its threads. `examine` asks them all and writes `RUN/doctor/{time}/`: `stacks-{role}.txt`,
`waits-{role}.json` and `summary.txt`, in words: who waits for whom since when.
"""

import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from slime.observability.diagnosis import Patient, summarize
from slime.observability.stacks import foreign_stacks
from slime.observability.waits import WaitRow, current_waits, file_name, report_to

logger = logging.getLogger(__name__)

# How long the processes may take to write their stacks, seconds; faulthandler needs milliseconds.
ANSWER_S = 3.0
_POLL_S = 0.05
# Lines of the summary that a message carries; the folder has all.
SHOWN_LINES = 12
# An examination this young serves the next late wait too, seconds.
SHARED_FOR_S = 10.0
_RUN_VARIABLE = "SLIME_DOCTOR_RUN_DIR"
_ROLE_VARIABLE = "SLIME_DOCTOR_ROLE"


@dataclass(frozen=True, kw_only=True)
class ProcessNote:
    """Where a process of the run is: the content of `RUN/processes/{role}.json`.

    Attributes:
        role: `driver`, `rollout manager`, `train rank 0`, `engine-0`, `router`.
        started: when the process began, seconds since 1970: a number given anew has another.
        answers: whether it writes its stacks at SIGUSR1, which would end any other process.
        main_thread: `ident` of the main thread, to find it among the stacks.
        address: `http://host:port` where it serves; empty when it does not.
    """

    role: str
    pid: int
    started: float
    host: str
    answers: bool
    main_thread: int = 0
    address: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found.

    Attributes:
        folder: stacks, waits and the summary.
        lines: the summary, most telling first.
    """

    folder: Path
    lines: tuple[str, ...]


def register_process(role: str, run_dir: Path, *, address: str = "") -> None:
    """Make this process one the doctor can examine; calling it again replaces role and folder."""
    global _registered
    for folder in (run_dir / "processes", run_dir / "doctor"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = _stacks_path(run_dir, role).open("a", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    if _registered is not None:
        _registered.file.close()
    _registered = _Registered(role, run_dir, file)
    report_to(role, run_dir / "doctor")
    main_thread = threading.main_thread().ident or 0
    note = _note(role, os.getpid(), answers=True, address=address)
    _write_note(run_dir, replace(note, main_thread=main_thread))


def unregister_process() -> None:
    """Answer no longer: the run this process belonged to is over."""
    global _registered
    if _registered is not None:
        faulthandler.unregister(signal.SIGUSR1)
        _registered.file.close()
        _registered = None


def register_child(role: str, pid: int, *, address: str = "") -> None:
    """Note a child that may not be slime's own: a router, an SGLang server.

    Does nothing where this process itself is not registered. A child that was started with
    `child_environment` and is ours calls `register_from_environment` and can then be asked itself.
    """
    if _registered is None:
        return
    path = _note_path(_registered.run_dir, role)
    known = _read_note(path)
    if known is None or known.pid != pid:
        _write_note(_registered.run_dir, _note(role, pid, answers=False, address=address))


def child_environment(role: str) -> dict[str, str]:
    """Variables that tell a child which run it belongs to; empty where this process has none."""
    if _registered is None:
        return {}
    return {_RUN_VARIABLE: str(_registered.run_dir), _ROLE_VARIABLE: role}


def register_from_environment(*, address: str = "") -> None:
    """`register_process` as `child_environment` of the parent says; nothing without one."""
    run_dir, role = os.environ.get(_RUN_VARIABLE), os.environ.get(_ROLE_VARIABLE)
    if run_dir and role:
        register_process(role, Path(run_dir), address=address)


def own_run_dir() -> Path | None:
    """The folder of the run this process registered for."""
    return None if _registered is None else _registered.run_dir


def dump_all(run_dir: Path, reason: str) -> Path:
    """The new folder with the stacks and waits of all processes of the run on this host."""
    return examine(run_dir, reason).folder


def examine(run_dir: Path, reason: str) -> Diagnosis:
    """Ask every process of the run on this host for its stacks and waits.

    Never raises for a process that cannot be asked: the summary says so.

    Args:
        reason: why, for the head of the summary.
    """
    folder = _new_folder(run_dir / "doctor")
    notes = [note for path in _notes(run_dir) if (note := _read_note(path)) is not None]
    sizes = {note.role: _size(_stacks_path(run_dir, note.role)) for note in notes}
    states = {note.role: _state(note) for note in notes}
    asked = [note for note in notes if states[note.role] == "answers" and _ask(note)]
    _await_stacks(run_dir, asked, sizes)
    patients = [
        _patient(run_dir, folder, note, states[note.role], sizes[note.role]) for note in notes
    ]
    lines = summarize(patients, socket.gethostname())
    head = [f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  {reason}", ""]
    (folder / "summary.txt").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return Diagnosis(folder, tuple(lines))


def late_report(late: str) -> str:
    """`late`, a sentence about a deadline that is over, with what an examination found.

    Waits that end together share one examination.
    """
    global _last
    run_dir = own_run_dir()
    if run_dir is None:
        return f"{late} The logs are in the run folder under logs/."
    try:
        with _examining:
            if _last is None or time.monotonic() - _last[0] > SHARED_FOR_S:
                _last = (time.monotonic(), examine(run_dir, late))
            found = _last[1]
    except OSError as error:  # a full disk must not hide who was late
        return f"{late} No stacks could be written ({error}); the logs are in {run_dir / 'logs'}."
    lines = [*found.lines[:SHOWN_LINES]]
    if len(found.lines) > SHOWN_LINES:
        lines.append(f"... {len(found.lines) - SHOWN_LINES} more in summary.txt")
    return "\n  ".join([f"{late} All stacks are in {found.folder}. Who waits for whom:", *lines])


def begin_run(run_dir: Path) -> None:
    """Forget the processes of an earlier start in this folder; its examinations stay."""
    for path in (
        *(run_dir / "processes").glob("*"),
        *(run_dir / "doctor").glob("waits-*.json"),
        *(run_dir / "doctor").glob("stacks-*.txt"),
    ):
        path.unlink(missing_ok=True)


def is_same_process(pid: int, started: float) -> bool:
    """Whether `pid` is alive and the process that began at `started`."""
    try:
        process = psutil.Process(pid)
        is_ended = process.status() == psutil.STATUS_ZOMBIE
        # The clock may have been set since; a number that was given anew is seconds younger.
        return not is_ended and abs(process.create_time() - started) < 2.0
    except psutil.Error:
        return False


def live_processes(run_dir: Path) -> list[ProcessNote]:
    """The noted processes of a run that are alive on this host."""
    notes = [note for path in _notes(run_dir) if (note := _read_note(path)) is not None]
    return [note for note in notes if _state(note) in ("answers", "silent")]


@dataclass(frozen=True)
class _Registered:
    role: str
    run_dir: Path
    file: TextIO  # faulthandler keeps only the descriptor: somebody has to hold the file


_registered: _Registered | None = None
_examining = threading.Lock()
_last: tuple[float, Diagnosis] | None = None


def _note(role: str, pid: int, *, answers: bool, address: str) -> ProcessNote:
    try:
        started = psutil.Process(pid).create_time()
    except psutil.Error:  # it ended at once
        started = 0.0
    host = socket.gethostname()
    return ProcessNote(
        role=role, pid=pid, started=started, host=host, answers=answers, address=address
    )


def _write_note(run_dir: Path, note: ProcessNote) -> None:
    path = _note_path(run_dir, note.role)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(note)) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_note(path: Path) -> ProcessNote | None:
    try:
        return ProcessNote(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _notes(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "processes").glob("*.json"))


def _note_path(run_dir: Path, role: str) -> Path:
    return run_dir / "processes" / f"{file_name(role)}.json"


def _stacks_path(run_dir: Path, role: str) -> Path:
    return run_dir / "doctor" / f"stacks-{file_name(role)}.txt"


def _new_folder(parent: Path) -> Path:
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{datetime.now().astimezone():%Y-%m-%d_%H-%M-%S}"
    for attempt in range(1, 1000):
        folder = parent / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:  # two processes examine at once
            continue
        return folder
    raise FileExistsError(f"{parent} holds 1000 examinations of the second {name}")


def _state(note: ProcessNote) -> str:
    """`answers`, `silent` (not ours), `ended`, or `elsewhere` (another host)."""
    if note.host != socket.gethostname():
        return "elsewhere"
    if not is_same_process(note.pid, note.started):
        return "ended"
    return "answers" if note.answers else "silent"


def _ask(note: ProcessNote) -> bool:
    if not _catches_sigusr1(note.pid):
        return False
    try:
        os.kill(note.pid, signal.SIGUSR1)
    except OSError as error:
        logger.warning("cannot signal %s (pid %d): %s", note.role, note.pid, error)
        return False
    return True


def _catches_sigusr1(pid: int) -> bool:
    """Whether the process still has a handler: without one the signal would end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _await_stacks(run_dir: Path, asked: Sequence[ProcessNote], before: dict[str, int]) -> None:
    """Return once every file has grown and rests, or after ANSWER_S."""
    deadline = time.monotonic() + ANSWER_S
    last: dict[str, int] = {}
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        sizes = {note.role: _size(_stacks_path(run_dir, note.role)) for note in asked}
        if sizes == last and all(size > before[role] for role, size in sizes.items()):
            return
        last = sizes


def _patient(run_dir: Path, folder: Path, note: ProcessNote, state: str, start: int) -> Patient:
    """What is known of one process; its files go into `folder`."""
    stacks, remark = "", ""
    source = _stacks_path(run_dir, note.role)
    if state == "answers":
        stacks = _read_from(source, start)
        remark = "" if stacks else f"gave no stacks within {ANSWER_S:.0f} s{_condition(note.pid)}"
    elif state == "silent":
        stacks, remark = foreign_stacks(note.pid)
    if stacks:
        (folder / source.name).write_text(stacks, encoding="utf-8")
    return Patient(
        role=note.role,
        pid=note.pid,
        host=note.host,
        state=state,
        address=note.address,
        main_thread=note.main_thread,
        stacks=stacks,
        remark=remark,
        waits=tuple(_waits(run_dir, folder, note, state)),
    )


def _condition(pid: int) -> str:
    """`: the system says it is stopped`, for a process that does not answer."""
    try:
        return f": the system says it is {psutil.Process(pid).status()}"
    except psutil.Error:
        return ""


def _read_from(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _waits(run_dir: Path, folder: Path, note: ProcessNote, state: str) -> list[WaitRow]:
    if note.pid == os.getpid():
        rows = current_waits()
        text = json.dumps([asdict(row) for row in rows], indent=1)
        (folder / f"waits-{file_name(note.role)}.json").write_text(text, encoding="utf-8")
        return rows
    path = run_dir / "doctor" / f"waits-{file_name(note.role)}.json"
    if state not in ("answers", "elsewhere"):
        return []
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # no old wait
    if content["pid"] != note.pid:
        return []
    shutil.copy(path, folder)
    # The table is as old as its last writing: a process whose threads stand still writes none.
    age_s = max(0.0, time.time() - content["time"])
    rows = [WaitRow(**row) for row in content["waits"]]
    return [replace(row, waited_s=round(row.waited_s + age_s, 3)) for row in rows]
