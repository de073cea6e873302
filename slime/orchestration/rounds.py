"""Generated rounds on disk, so that a resumed run takes them up instead of generating them again.

A round is recorded with its samples, metrics and the data source's state after it. It is used again
only when nothing that made it has changed: the flags of the rollout, the files of the functions the
user named, the prompts, and every bit of the weights that wrote it. So also what no seed repeats
(which groups an over-sampled round accepted, how far a partial rollout came) is as before the kill.
"""

import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from slime.config.config import Config
from slime.config.data import DataConfig
from slime.config.hooks import ROLLOUT_HOOKS
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig
from slime.data.packed import stored
from slime.data.sample import Sample
from slime.data.state import decode, encode, write_json
from slime.data.versions import versions_in
from slime.errors import CheckpointError
from slime.plugins import load_function
from slime.rollout.base_types import GroupFates, flatten

logger = logging.getLogger(__name__)

FORMAT = "slime-round-1"
# Flags of the three sections that change no sample of a round.
_WITHOUT_EFFECT = {
    "num_rollout",
    "num_epoch",
    "start_rollout_id",
    "rollout_timeout_s",
    "request_timeout_s",
    "sglang_router_ip",
    "sglang_router_port",
    "use_fault_tolerance",
    "reward_workers",
}


@dataclass(frozen=True)
class Round:
    """One generated round.

    Attributes:
        groups: as the rollout function returned them: samples, or lists of siblings, by group;
            in a round about to be saved, `frozen`.
        metrics: of the rollout function.
        fates: of the groups that are not in `groups`; None when the function does not tell.
        taken: (first, after the last) number of the groups taken from the data set in this round;
            None when the data source does not number them.
    """

    groups: Sequence[Any]
    metrics: dict[str, float]
    fates: GroupFates | None
    taken: tuple[int, int] | None


class RoundStore:
    """The recorded rounds of a run: `rounds/{rollout_id}.json` in its folder.

    Args:
        folder: of the records.
        fingerprint: see `rollout_fingerprint`.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    def save(
        self, rollout_id: int, made: Round, *, weights: str, data_state: Mapping[str, Any]
    ) -> None:
        """Record a round; `weights` is the digest of those that wrote it.

        Something in a sample that JSON cannot hold leaves the round unrecorded, with a warning.
        """
        content = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "weights": weights,
            "fates": made.fates and made.fates.to_dict(),
            "taken": made.taken,
            "data_state": dict(data_state),
        }
        try:
            content["metrics"] = encode(made.metrics)
            content["groups"] = encode(made.groups)
        except TypeError as error:
            logger.warning("round %d is not recorded: %s", rollout_id, error)
            return
        write_json(self._path(rollout_id), content, durable=False)

    def load(
        self, rollout_id: int, *, weights: Collection[str]
    ) -> tuple[Round, dict[str, Any]] | None:
        """A recorded round and the data source's state after it; None when it must be generated.

        Args:
            weights: digests of those that may have written it.
        """
        path = self._path(rollout_id)
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            logger.warning("%s is damaged and not used: %s", path, error)
            return None
        if reason := self._differs(content, weights):
            logger.info("rollout %d is generated again: %s", rollout_id, reason)
            return None
        fates = content["fates"]
        made = Round(
            groups=_with_samples(decode(content["groups"])),
            metrics=decode(content["metrics"]),
            fates=GroupFates.from_dict(fates) if fates else None,
            taken=tuple(content["taken"]) if content["taken"] else None,
        )
        return made, content["data_state"]

    def prune(self, up_to: int) -> None:
        """Remove the records of rounds up to `up_to`, which a checkpoint has made needless."""
        for path in self._folder.glob("*.json"):
            if path.stem.isdigit() and int(path.stem) <= up_to:
                path.unlink(missing_ok=True)

    def _differs(self, content: Mapping[str, Any], weights: Collection[str]) -> str:
        if content.get("format") != FORMAT:
            return "its record is of another version of slime"
        if content["fingerprint"] != self._fingerprint:
            return "flags, prompts or functions of the rollout have changed since it was recorded"
        if content["weights"] not in weights:
            return "it was recorded with other weights"
        return ""

    def _path(self, rollout_id: int) -> Path:
        return self._folder / f"{rollout_id}.json"


def rollout_fingerprint(config: Config) -> str:
    """A digest of all that decides what a round holds, but for weights and data state."""
    parts: list[Any] = []
    for section in (RolloutConfig, DataConfig, RewardConfig):
        names = [item.name for item in fields(section) if item.name not in _WITHOUT_EFFECT]
        parts += [(name, getattr(config, name)) for name in names]
    for name in ROLLOUT_HOOKS:
        value: Any = getattr(config, name)
        paths = [value] if isinstance(value, str) else list(cast(Sequence[str], value or ()))
        parts += [(path, _source_of(path)) for path in paths]
    if config.prompt_data is not None:
        parts.append(_file_facts(config.prompt_data))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def rollout_entry(made: Round, trained: Sequence[int] | None) -> dict[str, Any]:
    """The ledger's line of a round.

    Args:
        trained: `Sample.index` of every row of the batches, fillers apart; None when a user's
            function made the batches.
    """
    samples = [sample for group in made.groups for sample in _samples(group)]
    is_numbered = all(sample.index is not None for sample in samples)
    # Without numbers of the data source the trainer knows a sample by its place in the round.
    indexes = [i if sample.index is None else sample.index for i, sample in enumerate(samples)]
    unused = [] if trained is None else list((Counter(indexes) - Counter(trained)).elements())
    return {
        "samples": {
            "index": indexes,
            "group": [sample.group_index for sample in samples],
            "execution": [sample.rollout_id for sample in samples],
            "length": [sample.response_length for sample in samples],
            "reward": [_plain(sample.reward) for sample in samples],
            "status": [str(sample.status) for sample in samples],
            "version": [
                min(map(_number, _versions_of(sample)), default=None) for sample in samples
            ],
            "digest": [sample_digest(sample) for sample in samples],
        },
        "dropped": made.fates.dropped if made.fates else {},
        "returned": list(made.fates.returned) if made.fates else [],
        "taken": made.taken if made.fates else None,
        "unused": unused,
        "is_numbered": is_numbered,
        "is_converted": trained is None,
    }


def sample_digest(sample: Sample) -> str:
    """A digest of tokens, response length and the engine's log-probs, every bit of them."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.asarray(stored(sample, "tokens"), np.int64).tobytes())
    digest.update(sample.response_length.to_bytes(8))
    if (log_probs := stored(sample, "rollout_log_probs")) is not None:
        digest.update(np.asarray(log_probs, np.float64).tobytes())
    return digest.hexdigest()


def _samples(group: Any) -> list[Sample]:
    return [group] if isinstance(group, Sample) else flatten(group)


def frozen(groups: Sequence[Any]) -> list[Any]:
    """Nested lists of samples as lists of dicts, which later changes to the samples leave alone."""
    return [
        group.to_dict_packed() if isinstance(group, Sample) else frozen(cast(Sequence[Any], group))
        for group in groups
    ]


def _with_samples(groups: list[Any]) -> list[Any]:
    """Inverse of `frozen`."""
    return [
        _with_samples(cast(list[Any], group))
        if isinstance(group, list)
        else Sample.from_dict(group)
        for group in groups
    ]


def _plain(reward: Any) -> Any:
    """The reward as JSON; other things than numbers and dicts of them are not kept."""
    if isinstance(reward, Mapping):
        items = cast(Mapping[Any, Any], reward).items()
        return {str(name): _plain(value) for name, value in items}
    return float(reward) if isinstance(reward, int | float) else None


def _versions_of(sample: Sample) -> list[str]:
    """All that wrote a part of it: by its spans, or by engine call where it has none."""
    return list(versions_in(sample.version_spans)) or sample.weight_versions


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0


def _source_of(path: str) -> str:
    """A digest of the file in which the function at `path` is written."""
    try:
        file = inspect.getsourcefile(load_function(path))
    except TypeError:
        file = None
    return hashlib.blake2b(Path(file).read_bytes()).hexdigest() if file else ""


def _file_facts(prompt_data: str) -> tuple[str, int, int]:
    path = Path(prompt_data.rpartition("@[")[0] or prompt_data)
    try:
        facts = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return str(path), facts.st_size, facts.st_mtime_ns
