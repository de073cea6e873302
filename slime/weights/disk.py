"""Weights through files: the trainer writes a version, the engines load it by their stock endpoint.

Engines go on generating while a version is written and copied to their hosts; they stand still only while
they load it.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.engines.sglang.invitation import RECEIVER
from slime.errors import EngineError, WeightSyncError
from slime.observability.waits import waiting
from slime.weights.file_check import FileCheck
from slime.weights.local_copy import copy_path
from slime.weights.sync import Laps, SyncReport, verify_sums, weights_digest
from slime.weights.versions import Version, Versions, check_files

logger = logging.getLogger(__name__)

INFO_TIMEOUT_S = 30.0
# What was held against the trainer's tensors, by who looked.
_COMPARED = {
    "engines": "compared: what each engine holds",
    "receivers": "compared: what each rank of the engines holds, and its files",
    "files": "compared: files only",
    "": "nothing compared (--no-verify-weight-sync)",
}


class Copies(Protocol):
    """Copies of the weights on the engines' hosts."""

    @property
    def local_dir(self) -> str:
        """`--update-weight-local-checkpoint-dir`, the same on all hosts."""
        ...

    def bring(self, version: Path) -> list[str]:
        """Make all copies that version; why those are that need a whole one for it.

        Raises:
            WeightSyncError: a host cannot read the version, or not write its copy.
        """
        ...

    def close(self) -> None:
        """Leave the hosts."""
        ...


class DiskTransport:
    """From the training rank that writes to every engine, through a folder that all of them see.

    Args:
        control: the engines.
        versions: writes them; outlives this transport.
        copies: on the engines' hosts; None where they load what the trainer wrote.
        host: address of this process that the engines can reach.
        timeout_s: deadline of each wait, seconds.
    """

    def __init__(
        self,
        control: EngineControl,
        versions: Versions,
        *,
        copies: Copies | None = None,
        host: str,
        timeout_s: float,
    ) -> None:
        self._control = control
        self._versions = versions
        self._copies = copies
        self._check = FileCheck(control, host=host, timeout_s=timeout_s)
        self._judge: Literal["engines", "receivers", "files"] = "files"

    def open(self) -> None:
        """Find out who can tell what the engines hold.

        Raises:
            EngineUnavailable: an engine is dead.
        """
        infos = self._control.get_all("/server_info", timeout_s=INFO_TIMEOUT_S)
        if all(info.get("slime_engine") == "embedded" for info in infos):
            self._judge = "engines"
        elif all(RECEIVER in (info.get("custom_weight_loader") or ()) for info in infos):
            self._judge = "receivers"
        else:
            logger.warning(
                "engines without slime's receiver (--custom-weight-loader %s): of a weight sync through "
                "files only the files are read back and compared, not what engines made of them",
                RECEIVER,
            )

    def sync(
        self,
        named: Iterable[tuple[str, Tensor]],
        version: str,
        *,
        verify: bool,
        pause_mode: PauseMode,
        resumes: bool = True,
        written: Callable[[Path], None] = lambda folder: None,
    ) -> SyncReport:
        """Give every engine the trainer's weights; called on the one rank that writes.

        What fails before the pause leaves the engines as they were, generating; after it they stay paused.

        Args:
            named: (name, whole tensor) as the engines' checkpoint has them.
            verify: compare checksums of what each engine holds with the trainer's tensors.
            resumes: let the engines go on at the end.
            written: called with the version's folder when it is there, before anybody loads it.

        Raises:
            WeightSyncError: a full disk, an engine that cannot load the version, or holds other values.
            EngineError: an engine is gone.
        """
        report, clock = SyncReport(version), Laps()
        found = self._versions.publish(named, version)
        written(found.folder)
        folder = self._on_hosts(found)
        report.write_s = clock.lap("write")
        self._control.pause(pause_mode.value)
        report.pause_s = clock.lap("pause")
        # SGLang ends itself when it is to empty the cache of a request that is paused.
        flushes = self._judge == "engines" or pause_mode is PauseMode.ABORT
        answers = load_from_disk(self._control, folder, flushes=flushes)
        report.load_s = clock.lap("load")
        if verify:
            self._verify(found, folder, answers)
            report.verified_by = self._judge
            report.digest = weights_digest(found.sums)
            report.verify_s = clock.lap("verify")
        self._control.post_all(
            "/update_weight_version", {"new_version": version, "abort_all_requests": False}
        )
        if resumes:
            self._control.resume()
        self._versions.taken()
        report.resume_s = clock.lap("resume")
        report.num_tensors, report.num_bytes = len(found.sums), found.num_bytes
        report.density = found.density
        logger.info(
            "version %s through files: %.1f MiB%s; %s",
            version,
            found.num_bytes / 2**20,
            "" if found.density is None else f", {100 * found.density:.2f} % of the bytes changed",
            _COMPARED[report.verified_by],
        )
        return report

    def close(self) -> None:
        """Leave the hosts; files and copies stay."""
        if self._copies is not None:
            self._copies.close()

    def _on_hosts(self, version: Version) -> Path:
        """What the engines load."""
        if self._copies is None:
            return version.folder
        stale = self._copies.bring(version.folder)
        if stale:
            logger.info("a whole version %s is written: %s", version.number, "; ".join(stale))
            stale = self._copies.bring(self._versions.whole())
        if stale:
            raise WeightSyncError(
                f"weight sync failed: copies of version {version.number} did not come about: "
                f"{'; '.join(stale)}; does another run use --update-weight-local-checkpoint-dir "
                f"{self._copies.local_dir}?"
            )
        return copy_path(self._copies.local_dir)

    def _verify(self, version: Version, folder: Path, answers: list[dict[str, object]]) -> None:
        urls = self._control.urls
        if self._judge == "engines":
            sums = [answer.get("checksums") for answer in answers]
            verify_sums(version.sums, [s if isinstance(s, dict) else {} for s in sums], urls)
        elif self._judge == "receivers":
            sums = self._check.sums(folder)
            verify_sums(version.sums, sums, urls)
        elif version.density is None:  # each change was compared by the host that made it
            check_files(version.folder, version.sums)


def load_from_disk(
    control: EngineControl, folder: str | Path, *, flushes: bool = True
) -> list[dict[str, object]]:
    """The engines' answers when all of them have loaded a folder, and forgotten what they cached if `flushes`.

    Raises:
        WeightSyncError: one could not, or is gone.
    """
    # Said, as the engines may have been started without weights (--sglang-load-format dummy).
    body = {"model_path": str(folder), "load_format": "auto", "flush_cache": flushes}
    try:
        with waiting(", ".join(control.urls), "load weights", deadline_s=control.timeout_s):
            return control.post_all("/update_weights_from_disk", body)
    except EngineError as error:
        raise WeightSyncError(
            f"weight sync failed: {str(error).rstrip('.')}. Do all engines' hosts see {folder}? The engines "
            "stay paused."
        ) from error


def prove_tensors(
    control: EngineControl, folder: str | Path, *, host: str, timeout_s: float
) -> None:
    """Nothing, when SGLang servers make of a checkpoint's tensors, one by one, what they make of its files.

    Not so where SGLang processes weights after it has loaded files, as it does with those in 8 bits on some
    cards: it would then take tensors of a weight sync for something else than they are.

    Raises:
        WeightSyncError: names the parameters that differ.
    """
    load_from_disk(control, folder)
    FileCheck(control, host=host, timeout_s=timeout_s).sums(folder)
