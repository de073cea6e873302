"""How the weights of a training rank reach the engines through files: rank 0 writes them."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from slime.config.config import Config
from slime.engines.control import EngineControl
from slime.engines.protocol import PauseMode
from slime.errors import WeightSyncError
from slime.plugins import load_function
from slime.weights.delta_versions import DeltaVersions
from slime.weights.disk import DiskTransport
from slime.weights.sync import SyncReport
from slime.weights.versions import VersionFolder, Versions, WholeVersions

logger = logging.getLogger(__name__)

Hook = Callable[[Any, str, tuple[str, ...]], None]


def make_versions(config: Config) -> Versions | None:
    """What writes versions for rank 0 as long as it lives; None when weights do not go through files."""
    if config.update_weight_transport != "disk":
        return None
    assert config.update_weight_disk_dir, "config/weight_rules.py asks for it"
    assert config.hf_checkpoint, "config/rules.py asks for it"
    folder = VersionFolder(
        config.update_weight_disk_dir,
        config_from=config.hf_checkpoint,
        keeps=config.update_weight_disk_keep_files,
        # The others wait for this rank with a deadline of their own.
        patience_s=config.weight_sync_timeout_s / 2,
    )
    if config.update_weight_mode == "full":
        return WholeVersions(folder)
    return DeltaVersions(
        folder,
        encoding=config.update_weight_delta_encoding,
        checksum=config.update_weight_delta_checksum,
    )


class WayOverDisk:
    """One rank's way: rank 0 writes and talks to the engines; with a hook all ranks call it in between.

    Args:
        control: the engines.
        transport: of rank 0; None on the others.
        verify: as in `DiskTransport.sync`.
        pause_mode: as in `WayToEngines`.
        resumes: as in `DiskTransport.sync`.
        hook: `--custom-update-weight-post-write-path`.
        args: its first argument.
        gather: collective: objects of all ranks, in their order.
    """

    def __init__(
        self,
        control: EngineControl,
        transport: DiskTransport | None,
        *,
        verify: bool,
        pause_mode: PauseMode,
        resumes: bool,
        hook: Hook | None,
        args: Any,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self._control = control
        self._transport = transport
        self._verify = verify
        self._pause_mode = pause_mode
        self._resumes = resumes
        self._hook = hook
        self._args = args
        self._gather = gather
        self._has_met = False

    def open(self) -> None:
        """Connect to the engines."""
        if self._transport is not None:
            self._transport.open()

    def begin(self) -> None:
        """Another sync."""
        self._has_met = False

    def sync(self, named: Iterable[tuple[str, Tensor]], version: str) -> SyncReport | None:
        """Bring the engines to these weights; the report on rank 0. Collective.

        Raises:
            WeightSyncError: as `DiskTransport.sync`, or the hook failed on some rank.
        """
        if self._transport is not None:
            return self._transport.sync(
                named,
                version,
                verify=self._verify,
                pause_mode=self._pause_mode,
                resumes=self._resumes,
                written=self._written,
            )
        for _ in named:
            pass
        self._written(None)
        return None

    def failed(self, error: Exception) -> None:
        """Tell the ranks that wait for the version to be written, if they still do."""
        if self._hook is not None and not self._has_met:
            with contextlib.suppress(WeightSyncError):
                self._meet(str(error), None)

    def close(self) -> None:
        """Leave the engines and their hosts."""
        if self._transport is not None:
            self._transport.close()
        self._control.close()

    def _written(self, folder: Path | None) -> None:
        """Call the hook on every rank; nobody goes on before all are through."""
        if self._hook is None:
            return
        found = self._meet(None, folder)
        problem = None
        try:
            self._hook(self._args, str(found), self._control.urls)
        except Exception as error:
            logger.exception("--custom-update-weight-post-write-path failed")
            problem = f"--custom-update-weight-post-write-path failed on {found}: {error!r}"
        self._meet(problem, None)

    def _meet(self, problem: str | None, folder: Path | None) -> Path | None:
        """The folder that one rank has written; raises what went wrong on any."""
        told = self._gather((problem, folder))
        self._has_met = True
        for text, _ in told:
            if text is not None:
                raise WeightSyncError(text)
        return next((path for _, path in told if path is not None), None)


def hook_of(config: Config) -> Hook | None:
    """The function behind `--custom-update-weight-post-write-path`."""
    path = config.custom_update_weight_post_write_path
    return None if path is None else load_function(path)
