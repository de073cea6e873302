"""Groups on their way to a round, on disk beside the data source's state, so that a resume goes on with them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slime.data.sample import PrefixCacheInfo, Sample, SpecInfo
from slime.data.state import decode, encode, read_json, write_json
from slime.data.versions import versions_in
from slime.errors import CheckpointError
from slime.rollout.base_types import Execution
from slime.rollout.groups import snapshot

logger = logging.getLogger(__name__)

FORMAT = "slime-unfinished-1"

Status = Sample.Status


@dataclass(frozen=True)
class Unfinished:
    """A group that was begun and is in no round as yet.

    Attributes:
        group: its executions, with what they have.
        before: its samples as they were when it was begun.
        weights: see `admission.py`.
        is_whole: nothing is left to do but train on it.
    """

    group: Sequence[Execution]
    before: list[Sample]
    weights: int
    is_whole: bool = False

    def for_data_source(self) -> list[Sample]:
        """The group as a data source takes it back: a fan-out has no place there and begins anew."""
        samples = [sample for sample in self.group if isinstance(sample, Sample)]
        return samples if len(samples) == len(self.group) else self.before


def unfinished_path(root: str, rollout_id: int) -> Path:
    """Where the groups lie that were unfinished after round `rollout_id`, below a checkpoint folder."""
    return Path(root) / "rollout" / f"unfinished_groups_{rollout_id}.json"


def save_unfinished(root: str, rollout_id: int, groups: Sequence[Unfinished]) -> None:
    """Write the groups; answers that hold something JSON cannot are left out, with a warning.

    Raises:
        TypeError: a prompt holds such a thing.
        CheckpointError: the disk is full, or cannot be written.
    """
    content = {"format": FORMAT, "groups": [_encoded(group) for group in groups]}
    write_json(unfinished_path(root, rollout_id), content)


def load_unfinished(root: str, rollout_id: int) -> list[Unfinished]:
    """What `save_unfinished` wrote; none where the checkpoint's run did not generate all the time.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    path = unfinished_path(root, rollout_id)
    if not path.is_file():
        return []
    content = cast(dict[str, Any], read_json(path))
    if not isinstance(cast(object, content), dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no unfinished groups of the format {FORMAT}")
    try:
        return [_decoded(entry) for entry in content["groups"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); resume from an earlier "
            "checkpoint with --ckpt-step"
        ) from error


def frozen_sample(sample: Sample, before: Sample, *, is_plain: bool, group_rm: bool) -> Sample:
    """A copy of a sample that is being generated, fit to go on from.

    Args:
        before: as it was when it was begun.
        is_plain: slime's own generate function writes it, which leaves it whole at any moment. Of a
            user's function nobody knows; then only a sample that has its reward is taken as it is.
        group_rm: rewards come for a whole group.
    """
    is_judged = sample.status not in (Status.PENDING, Status.ABORTED) and sample.reward is not None
    return snapshot(sample if is_plain or (is_judged and not group_rm) else before)


def oldest_weights(group: Sequence[Sample], begun: int) -> int:
    """Rounds trained into the oldest weights that wrote a token of the group.

    Args:
        begun: as far as is known from when it was begun; what counts where a sample does not tell.
    """
    numbers: list[int] = []
    for sample in group:
        if not sample.response_length:
            continue
        versions = list(versions_in(sample.version_spans))
        is_known = versions and all(version.isdigit() for version in versions)
        numbers.append(min(map(int, versions)) - 1 if is_known else begun)
    return min(numbers, default=begun)


def renewed(sample: Sample) -> Sample:
    """Its prompt, to be answered anew."""
    fresh = snapshot(sample)
    fresh.tokens = sample.tokens[: sample.prompt_length]
    fresh.response, fresh.response_length = "", 0
    fresh.weight_versions, fresh.version_spans = [], []
    fresh.loss_mask = fresh.rollout_log_probs = fresh.teacher_log_probs = None
    fresh.rollout_top_p_token_ids = fresh.rollout_top_p_token_offsets = None
    fresh.rollout_routed_experts = None
    fresh.reward = fresh.usage = None
    fresh.status, fresh.remove_sample, fresh.non_generation_time = Status.PENDING, False, 0.0
    fresh.spec_info, fresh.prefix_cache_info = SpecInfo(), PrefixCacheInfo()
    return fresh


def _encoded(item: Unfinished) -> dict[str, Any]:
    content = {"weights": item.weights, "before": _as_json(item.before)}
    try:
        return content | {"group": _as_json(item.group), "is_whole": item.is_whole}
    except TypeError as error:
        logger.warning(
            "group %s is saved without its answers: %s", item.before[0].group_index, error
        )
        return content | {"group": content["before"], "is_whole": False}


def _as_json(group: Sequence[Execution]) -> list[Any]:
    return [
        encode(part.to_dict()) if isinstance(part, Sample) else _as_json(part) for part in group
    ]


def _decoded(entry: dict[str, Any]) -> Unfinished:
    return Unfinished(
        group=[
            [_sample(sibling) for sibling in cast(list[Any], part)]
            if isinstance(part, list)
            else _sample(part)
            for part in entry["group"]
        ],
        before=[_sample(item) for item in entry["before"]],
        weights=entry["weights"],
        is_whole=entry["is_whole"],
    )


def _sample(item: Any) -> Sample:
    return Sample.from_dict(decode(item))
