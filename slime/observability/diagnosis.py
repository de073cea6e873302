"""Who waits for whom, in words, from what the doctor found in each process."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slime.observability.stacks import collective_frame, parse_stacks, telling_frame
from slime.observability.waits import WaitRow

_ALL_RANKS = "train rank "


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One process.

    Attributes:
        role, pid, host, address, main_thread: as in its ProcessNote.
        state: `answers`, `silent` (not ours), `ended` or `elsewhere` (another host).
        stacks: text of all its stacks; empty when there are none.
        remark: why there are none.
        waits: what it waits for, the oldest first.
    """

    role: str
    pid: int
    host: str
    state: str
    address: str = ""
    main_thread: int = 0
    stacks: str = ""
    remark: str = ""
    waits: tuple[WaitRow, ...] = ()


def summarize(patients: Sequence[Patient], host: str) -> list[str]:
    """Lines from who waits to who is waited for; a missing rank stands first."""
    lines = missing_ranks(patients)
    lines += [line for patient in _in_order(patients) for line in _lines(patient)]
    others = sorted({patient.host for patient in patients if patient.state == "elsewhere"})
    if others:
        lines.append(f"not asked, on other hosts than {host}: {', '.join(others)}")
    return lines or ["no process of this run is registered"]


def missing_ranks(patients: Sequence[Patient]) -> list[str]:
    """A line that names the training ranks the others wait for in a collective, if it shows."""
    ranks = [patient for patient in patients if patient.role.startswith(_ALL_RANKS)]
    inside = {
        patient.role: call
        for patient in ranks
        if (call := collective_frame(parse_stacks(patient.stacks))) is not None
    }
    outside = [p for p in ranks if p.role not in inside and (p.stacks or p.state == "ended")]
    if not inside or not outside:
        return []
    calls = sorted({call.function for call in inside.values()})
    return [
        f"{_names(inside)} wait{'s' if len(inside) == 1 else ''} in a collective "
        f"({', '.join(calls)}) for {_names(p.role for p in outside)}, which "
        f"{'is' if len(outside) == 1 else 'are'} not in one"
    ]


def _in_order(patients: Sequence[Patient]) -> list[Patient]:
    """Follow the waits, the driver first; then those nobody waits for."""
    by_role = {patient.role: patient for patient in patients}
    order: dict[str, Patient] = {}

    def visit(patient: Patient) -> None:
        if patient.role in order:
            return
        order[patient.role] = patient
        for other in _awaited(patient, patients):
            visit(other)

    for role in ("driver", "rollout manager", *by_role):
        if role in by_role:
            visit(by_role[role])
    return list(order.values())


def _awaited(patient: Patient, patients: Sequence[Patient]) -> list[Patient]:
    names = [row.on for row in patient.waits]
    return [
        other
        for other in patients
        if other is not patient and any(_is_named(other, name) for name in names)
    ]


def _is_named(patient: Patient, name: str) -> bool:
    """Whether `name` speaks of this process: `train rank 1` is not in `train rank 10`."""
    role = "[- ]".join(map(re.escape, re.split("[- ]", patient.role)))
    words = [role] + ([re.escape(patient.address)] if patient.address else [])
    return re.search(rf"(?:{'|'.join(words)})(?!\d)", name) is not None


def _lines(patient: Patient) -> list[str]:
    name = f"{patient.role} (pid {patient.pid})"
    if patient.state == "elsewhere" and not patient.waits:
        return []
    if patient.state == "ended":
        return [f"{name} is not running any more"]
    lines = [f"{name}: {row}" for row in patient.waits] or [f"{name}: no wait noted"]
    frame = telling_frame(parse_stacks(patient.stacks), patient.main_thread)
    where = patient.remark or ("" if frame is None else f"in {frame}")
    if where:
        lines[-1] += f"; {where}"
    return lines


def _names(roles: Iterable[str]) -> str:
    numbers = [role.removeprefix(_ALL_RANKS) for role in roles]
    return f"train rank{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"
