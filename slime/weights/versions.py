"""Versions of the weights as folders: written whole, named when they are, removed when a newer one is taken."""

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.checkpoint.hf import read_hf_config
from slime.checkpoint.hf_writer import write_hf_folder
from slime.engines.checksum import checksum
from slime.errors import CheckpointError, WeightSyncError
from slime.observability.disk import folder_bytes, write_failure

logger = logging.getLogger(__name__)

# What an index says of a version, under this name.
METADATA = "slime"
POLL_S = 1.0


@dataclass(frozen=True)
class Version:
    """A version of the weights on disk.

    Attributes:
        number: as engines report it.
        folder: what engines load, or what makes a copy of the version before to this one.
        sums: checksum of each tensor by name, of the trainer's own bits.
        num_bytes: written.
        density: share of the bytes of all tensors that changed; None of a whole version.
    """

    number: str
    folder: Path
    sums: dict[str, int]
    num_bytes: int
    density: float | None = None


class Versions(Protocol):
    """Writes versions; one for a training rank's life, whichever engines come and go."""

    def publish(self, named: Iterable[tuple[str, Tensor]], number: str) -> Version:
        """The version on disk; one that is there already is not written again.

        Raises:
            WeightSyncError: the disk is full and stayed so, or cannot be written.
        """
        ...

    def whole(self) -> Path:
        """A folder with every tensor of the last version; raises as `publish`."""
        ...

    def taken(self) -> None:
        """All engines have the last version: those before it may go."""
        ...


class VersionFolder:
    """The folder that versions are written to.

    Args:
        path: `--update-weight-disk-dir`.
        config_from: the folder whose config and tokenizer each version gets.
        keeps: leave old versions where they are.
        patience_s: how long a write waits for room on a full disk, seconds.
    """

    def __init__(
        self, path: str | Path, *, config_from: str | Path, keeps: bool, patience_s: float
    ) -> None:
        self.path = Path(path).absolute()
        self.config_from = config_from
        # Numbers are used again when a run goes on from a checkpoint: this says whose they are.
        self.run = uuid.uuid4().hex
        self._keeps = keeps
        self._patience_s = patience_s
        self._written: list[Path] = []

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        number: str,
        *,
        suffix: str = "",
        metadata: Callable[[], dict[str, Any]],
    ) -> Path:
        """A folder of these tensors, `weight_v000007` for number 7; it has its name only when it is whole.

        Args:
            suffix: of its name.
            metadata: called at the end: what the index says of it, besides number and run.

        Raises:
            WeightSyncError: the disk is full and stayed so, or cannot be written.
        """
        folder = self.path / f"weight_v{int(number):06d}{suffix}"
        config = read_hf_config(self.config_from)
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        # In 8 bits the dtype of the files is not the model's; what they were made of is.
        kept = [name for name in (key, "quantization_config") if name in config]
        changes = {name: config[name] for name in kept} if "quantization_config" in config else {}
        try:
            write_hf_folder(
                folder,
                tensors,
                config_from=self.config_from,
                overwrite=True,
                config_changes=changes,
                index_metadata=lambda: {
                    METADATA: {"run": self.run, "version": number, **metadata()}
                },
                make_room=_Room(folder, self._patience_s, self._remove_oldest),
            )
        except (CheckpointError, OSError) as error:
            reason = error if isinstance(error, CheckpointError) else write_failure(folder, error)
            raise WeightSyncError(
                f"version {number} of the weights was not written, so the engines keep the one before: "
                f"{reason}. Nothing of the run is lost: it goes on from its last checkpoint."
            ) from error
        self._written = [path for path in self._written if path != folder] + [folder]
        return folder

    def keep_only(self, *folders: Path) -> None:
        """Remove the others that this process wrote, unless all are to be kept."""
        while not self._keeps and self._remove_oldest(*folders):
            pass

    def _remove_oldest(self, *but: Path) -> bool:
        """Whether there was one to remove."""
        if self._keeps:
            return False
        for folder in self._written:
            if folder not in but:
                self._written.remove(folder)
                shutil.rmtree(folder, ignore_errors=True)
                return True
        return False


class WholeVersions:
    """As `Versions`, each with every tensor.

    Args:
        folder: where to.
    """

    def __init__(self, folder: VersionFolder) -> None:
        self._folder = folder
        self._last: Version | None = None

    def publish(self, named: Iterable[tuple[str, Tensor]], number: str) -> Version:
        """As `Versions`."""
        last = self._last
        if last is not None and last.number == number and last.folder.is_dir():
            check_same(last, {name: checksum(tensor) for name, tensor in named})
            return last
        sums: dict[str, int] = {}
        folder = self._folder.write(
            with_sums(named, sums), number, metadata=lambda: {"checksums": sums}
        )
        self._last = Version(number, folder, sums, folder_bytes(folder))
        return self._last

    def whole(self) -> Path:
        """As `Versions`."""
        assert self._last is not None, "publish() comes first"
        return self._last.folder

    def taken(self) -> None:
        """As `Versions`."""
        self._folder.keep_only(self.whole())


def with_sums(
    named: Iterable[tuple[str, Tensor]], sums: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The same; the checksum of each goes into `sums`, taken where the tensor is."""
    for name, tensor in named:
        sums[name] = checksum(tensor)
        yield name, tensor


def check_same(last: Version, sums: dict[str, int]) -> None:
    """Nothing, when these are the weights of that version.

    Raises:
        WeightSyncError: the trainer has others under the same number.
    """
    changed = sorted(name for name in {*sums, *last.sums} if sums.get(name) != last.sums.get(name))
    if changed:
        raise WeightSyncError(
            f"version {last.number} was written already, with other values of {', '.join(changed[:8])}: two "
            "versions must not share a number. Report this with the train rank's log."
        )


def check_files(folder: Path, sums: dict[str, int]) -> None:
    """Nothing, when the files of a whole version read back as what the trainer has.

    Raises:
        WeightSyncError: names the first tensor that does not.
    """
    found: dict[str, int] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                found |= {name: checksum(opened.get_tensor(name)) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"{folder} cannot be read back: {error}") from error
    wrong = sorted(name for name in {*found, *sums} if found.get(name) != sums.get(name))
    if wrong:
        raise WeightSyncError(
            f"{folder} reads back as something else than was written, first {wrong[0]}; the disk may be failing"
        )


class _Room:
    """What a writer does about a full disk: older versions go, then it waits.

    Args:
        folder: that is being written, for messages.
        remove_oldest: whether it removed something.
    """

    def __init__(self, folder: Path, patience_s: float, remove_oldest: Callable[[], bool]) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._remove_oldest = remove_oldest
        self._deadline: float | None = None

    def __call__(self, error: OSError) -> None:
        """Come back when another try is worth it.

        Raises:
            OSError: the disk stayed full.
        """
        if self._remove_oldest():
            return
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience_s
            logger.warning(
                "%s. The run waits up to %.0f s for room.",
                write_failure(self._folder, error),
                self._patience_s,
            )
        if now > self._deadline:
            raise error
        time.sleep(POLL_S)
