"""RunFolder: one private folder per run, for config, metrics, samples, logs, checkpoints."""

import fcntl
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from slime.errors import ConfigError

logger = logging.getLogger(__name__)

_MODE = 0o700  # prompts, answers and paths are nobody else's business


class RunFolder:
    """The folder of one run, held by a lock until `release` or the end of the process.

    Layout: `config.json metrics.jsonl ledger.jsonl rounds/ tensorboard/ samples/ logs/`. A finished run's
    folder may be used again (a resumed run goes on in the same files); a live run's may not.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        for folder in (self.tensorboard, self.samples, self.rounds, self.logs):
            folder.mkdir(mode=_MODE, exist_ok=True)

    @classmethod
    def open(cls, path: str | Path | None = None, *, parent: str | Path = "runs") -> "RunFolder":
        """The folder `path`, made if need be; without one, a new folder in `parent` named by now.

        Raises:
            ConfigError: another live process runs in this folder, or it cannot be written.
        """
        try:
            folder = _new_folder(Path(parent)) if path is None else Path(path)
            folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
            return cls(folder.resolve(), _lock_folder(folder))
        except OSError as error:
            raise ConfigError(
                f"--run-dir {path or parent} cannot be used: {error}. Give a folder that this user "
                "can write to."
            ) from error

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def write_config(self, config_json: str) -> None:
        """Write `config.json`; that of an earlier run is kept as `config.1.json` if it differs."""
        if self.config.exists() and self.config.read_text(encoding="utf-8") != config_json:
            number = 1
            while (kept := self.path / f"config.{number}.json").exists():
                number += 1
            self.config.rename(kept)
            logger.info("this folder was used before; its config is kept as %s", kept.name)
        self.config.write_text(config_json, encoding="utf-8")

    def release(self) -> None:
        """Let another run use the folder."""
        os.close(self._lock)


def _new_folder(parent: Path) -> Path:
    parent.mkdir(mode=_MODE, parents=True, exist_ok=True)
    name = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = parent / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            folder.mkdir(mode=_MODE)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent} holds 1000 runs started in the second {name}")


def _lock_folder(folder: Path) -> int:
    """The locked file. The kernel drops the lock with this process, so none is ever stale."""
    # A bare descriptor: a file object would let go of the lock when it is garbage-collected.
    lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 1000).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise ConfigError(
            f"--run-dir {folder} is in use by {owner}. Two runs in one folder would mix their "
            "metrics and checkpoints: wait for it to end, or give another --run-dir."
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock
