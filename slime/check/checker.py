"""check(): a command line, judged as a whole in a second or two; nothing is started.

Imports neither torch nor Ray nor transformers, and runs no code of the user.
"""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slime.check.data import check_data
from slime.check.functions import check_functions
from slime.check.model import check_model
from slime.check.modules import Modules
from slime.check.places import (
    FreeBytes,
    check_disk,
    check_ports,
    check_run_folder,
    free_disk_bytes,
)
from slime.check.plan import Cluster, check_cluster, check_epochs, make_plan
from slime.check.start import check_start
from slime.check.summary import Facts, summary
from slime.config.config import Config
from slime.config.problems import Problems
from slime.config.resolve import check_alternating, check_overlapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """The judgement.

    Attributes:
        problems: what is wrong, each with what to do; empty when the run can start.
        notes: what is worth knowing and stops nothing.
        summary: what the run will do; empty when there are problems.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    summary: str


def check(
    config: Config,
    problems: Problems,
    *,
    overlaps: bool = False,
    folders: Sequence[str] = (".",),
    cluster: Cluster | None = None,
    free_bytes: FreeBytes = free_disk_bytes,
) -> Checked:
    """Everything about a resolved command line that can be known before a process is started.

    Args:
        config: as far as it could be resolved.
        problems: those found so far; more are added.
        overlaps: whether rounds are generated while the model trains, as train_async.py does.
        folders: where modules are looked for before `sys.path`.
        cluster: the machines it is meant for; None = this one.
        free_bytes: free disk space below a folder.
    """
    with collected_notes() as notes:
        view = problems.readable(config)
        with problems.caught():
            (check_overlapping if overlaps else check_alternating)(view)
        check_functions(config, problems, Modules(folders))
        model = check_model(config, problems)
        data = check_data(config, problems)
        prompts = next((item for item in data if item.name is None), None)
        check_epochs(config, prompts, problems)
        # What this machine lacks is no fault of a run that is meant for others.
        here = problems if cluster is None else problems.apart()
        start = check_start(config, problems, here=here)
        if cluster is not None:
            check_cluster(config, cluster, problems)
        else:
            check_ports(config, problems)
        check_run_folder(config, here)
        text = ""
        with problems.caught():
            plan = make_plan(view, prompts, start.first_round)
            disk = check_disk(view, model, plan, here, free_bytes=free_bytes)
            if not problems.messages and model is not None:
                text = summary(Facts(config, model, data, start, plan, disk))
        if here is not problems:
            for message in here.messages:
                logger.warning("on this machine, which need not be one of them: %s", message)
    return Checked(tuple(problems.messages), tuple(notes), text)


@contextmanager
def collected_notes() -> Generator[list[str]]:
    """Texts of the warnings that slime logs inside, none twice; they are not printed."""
    notes: list[str] = []
    collector = _Collector(notes)
    package = logging.getLogger("slime")
    propagated, package.propagate = package.propagate, False
    package.addHandler(collector)
    try:
        yield notes
    finally:
        package.removeHandler(collector)
        package.propagate = propagated


class _Collector(logging.Handler):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self._notes:
            self._notes.append(text)
