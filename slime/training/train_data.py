"""The training data of one round as columns: a dict of lists, one entry per sample.

`--custom-convert-samples-to-train-data-path` returns such a dict, and `samples_to_train_data`
builds the default one, so both take the same road afterwards.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np

from slime.data.packed import LEAST, Packed, Row, row_sum, stored
from slime.data.sample import Sample
from slime.data.versions import num_policies
from slime.errors import DataError
from slime.training.rewards import execution_keys

TrainData = dict[str, list[Any]]

_LISTS_OF_R = ("loss_mask", "rollout_log_probs", "teacher_log_probs")
_PLAIN = (list, Packed)
_ANYTHING = (-math.inf, math.inf)
_RARE_LISTS = (
    "rollout_top_p_token_ids",
    "rollout_top_p_token_offsets",
    "rollout_routed_experts",
)

REQUIRED = ("tokens", "response_lengths", "rewards")
RAGGED = ("loss_masks", "rollout_log_probs", "teacher_log_probs")
# Columns a RolloutBatch has a field for; every other column travels in its `extras`.
KNOWN = (
    *REQUIRED,
    *RAGGED,
    "rollout_routed_experts",
    "raw_reward",
    "truncated",
    "sample_indices",
    "rollout_ids",
    "rollout_mask_sums",
)


def samples_to_train_data(
    samples: Sequence[Sample], rewards: Sequence[float], raw_rewards: Sequence[float]
) -> TrainData:
    """Samples as columns.

    An optional column is there if *any* sample has a value; the others get None.

    Raises:
        DataError: lists of one sample do not fit together.
    """
    has_good_entries, truncated = _have_good_entries(samples), Sample.Status.TRUNCATED
    for sample in samples:
        if not (has_good_entries and _is_plain(sample)):
            sample.validate(entries=not has_good_entries)
    data: TrainData = {
        "tokens": [stored(sample, "tokens") for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": list(rewards),
        "raw_reward": list(raw_rewards),
        "truncated": [int(s.status == truncated) for s in samples],
        "sample_indices": [
            i if sample.index is None else sample.index for i, sample in enumerate(samples)
        ],
        "rollout_ids": list(execution_keys(samples)),
        "loss_masks": [_loss_mask(sample) for sample in samples],
    }
    optional: TrainData = {
        "rollout_log_probs": [stored(sample, "rollout_log_probs") for sample in samples],
        "teacher_log_probs": [sample.teacher_log_probs for sample in samples],
        "rollout_routed_experts": [sample.rollout_routed_experts for sample in samples],
        "multimodal_train_inputs": [sample.multimodal_train_inputs for sample in samples],
        "metadata": [sample.train_metadata for sample in samples],
        "round_number": [sample.metadata.get("round_number") for sample in samples],
        "source_names": [sample.metadata.get("source_name") for sample in samples],
        "version_spans": _version_spans(samples),
    }
    return data | {name: c for name, c in optional.items() if {*map(type, c)} - {NoneType}}


def _version_spans(samples: Sequence[Sample]) -> list[Any]:
    """Which weights wrote which tokens; a column only where a sample was not written by one alone."""
    if all(num_policies(sample.version_spans) < 2 for sample in samples):
        return [None] * len(samples)
    return [sample.version_spans for sample in samples]


def _is_plain(sample: Sample) -> bool:
    """Whether a sample is of the commonest kind and surely fits together.

    A shortcut past `Sample.validate`, which takes four times as long and says what is wrong.
    """
    fields = vars(sample)
    length, tokens = fields["response_length"], fields["tokens"]
    if type(length) is not int or type(tokens) not in _PLAIN or not 0 <= length <= len(tokens):
        return False
    for name in _LISTS_OF_R:
        row = fields[name]
        if row is not None and (type(row) not in _PLAIN or len(row) != length):
            return False
    for name in _RARE_LISTS:
        if fields[name] is not None:
            return False
    reward = fields["reward"]
    return not isinstance(reward, float) or math.isfinite(reward)


def _have_good_entries(samples: Sequence[Sample]) -> bool:
    """Whether the lists of all samples hold what they may, short ones looked at as one array.

    A few large arrays instead of thousands of small ones. On False `Sample.validate` finds the
    sample and says what is wrong with it.
    """
    bounds = {"tokens": (0.0, math.inf), "loss_mask": (0.0, 1.0)}
    for name in ("tokens", "loss_mask", "rollout_log_probs", "teacher_log_probs"):
        rows = [row for s in samples if (row := stored(s, name)) is not None]
        arrays: list[np.ndarray[Any, Any]] = [row for row in rows if isinstance(row, np.ndarray)]
        try:
            others = chain.from_iterable(row for row in rows if not isinstance(row, np.ndarray))
            arrays.append(np.array(list(others)))
        except (TypeError, ValueError):
            return False
        kinds = "fiu" if name.endswith("log_probs") else "iu"
        if not all(_are_good(array, kinds, *bounds.get(name, _ANYTHING)) for array in arrays):
            return False
    return True


def _are_good(values: np.ndarray[Any, Any], kinds: str, low: float, high: float) -> bool:
    """Whether they are finite numbers of these numpy kinds in [low, high]; an empty list has none."""
    if not values.size:
        return True
    if values.dtype.kind not in kinds or values.ndim != 1:
        return False
    return bool(np.isfinite(values).all() and values.min() >= low and values.max() <= high)


def complete_train_data(data: Mapping[str, Sequence[Any]]) -> TrainData:
    """The columns checked, and those that can be derived added.

    Derived when absent: `loss_masks` (all ones), `raw_reward` (= `rewards`), `truncated` (0),
    `sample_indices`, `rollout_ids` (each sample its own execution), `rollout_mask_sums`. Log-probs
    a sample lacks become 0.0 where none of its tokens train.

    Raises:
        DataError: a required column is missing, a length is wrong, or log-probs are missing that
            train.
    """
    if missing := [name for name in REQUIRED if name not in data]:
        raise DataError(f"train data lacks {missing}; it has {sorted(data)}")
    count = len(data["tokens"])
    for name, column in data.items():
        if len(column) != count:
            raise DataError(f"train data: {name} has {len(column)} entries for {count} samples")
    full: TrainData = {name: list(column) for name, column in data.items()}
    full.setdefault("loss_masks", [[1] * length for length in full["response_lengths"]])
    full.setdefault("raw_reward", list(full["rewards"]))
    full.setdefault("truncated", [0] * count)
    full.setdefault("sample_indices", list(range(count)))
    full.setdefault("rollout_ids", list(range(count)))
    mask_sums = [float(row_sum(mask)) for mask in full["loss_masks"]]
    if not _all_rows_fit(full):
        for position, mask_sum in enumerate(mask_sums):
            _check_row(full, position, trains=mask_sum != 0.0)
    full.setdefault("rollout_mask_sums", _execution_mask_sums(full["rollout_ids"], mask_sums))
    return full


def _loss_mask(sample: Sample) -> Row:
    mask = stored(sample, "loss_mask")
    if mask is not None and not sample.remove_sample:
        return mask
    number, length = 1 - int(sample.remove_sample), sample.response_length
    return [number] * length if length < LEAST else np.full(length, number, np.int8)


def _all_rows_fit(data: TrainData) -> bool:
    """Whether `_check_row` would pass every sample and fill nothing, found column by column."""
    types = {*map(type, data["rewards"]), *map(type, data["raw_reward"])}
    lengths, totals = data["response_lengths"], map(len, data["tokens"])
    return (
        types <= {int, float}
        and {*map(type, lengths)} <= {int}
        and min(lengths, default=0) >= 0
        and all(map(operator.lt, lengths, totals))
        and all(
            NoneType not in map(type, data[name]) and list(map(len, data[name])) == lengths
            for name in RAGGED
            if name in data
        )
    )


def _check_row(data: TrainData, position: int, *, trains: bool) -> None:
    """Check one sample's rewards and lengths; fill the log-probs it lacks."""
    index = data["sample_indices"][position]
    for name in ("rewards", "raw_reward"):
        if not isinstance(data[name][position], int | float):
            raise DataError(
                f"sample {index}: {name} is {data[name][position]!r}, expected a number"
            )
    length, total = data["response_lengths"][position], len(data["tokens"][position])
    if not 0 <= length < total:
        raise DataError(
            f"sample {index}: response_length {length} of {total} tokens; at least one prompt "
            "token must stand before the response"
        )
    for name in RAGGED:
        if name not in data:
            continue
        row = data[name][position]
        if row is None and not trains:
            data[name][position] = [0.0] * length
        elif row is None:
            raise DataError(
                f"sample {index} trains but has no {name}, while other samples have; give them for "
                "all samples, or set remove_sample on those without"
            )
        elif len(row) != length:
            raise DataError(f"sample {index}: {len(row)} {name} for {length} response tokens")


def _execution_mask_sums(executions: list[Any], mask_sums: list[float]) -> list[float]:
    """Trainable tokens of the whole execution each sample belongs to."""
    sums: dict[Any, float] = {}
    for execution, mask_sum in zip(executions, mask_sums, strict=True):
        sums[execution] = sums.get(execution, 0.0) + mask_sum
    return [sums[execution] for execution in executions]
