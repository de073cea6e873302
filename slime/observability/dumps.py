"""Rollout data on disk: whole dumps to replay a step from, and a few samples per round to read.

Samples come and go as plain dicts, from `Sample.to_dict` and for `Sample.from_dict`.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from slime.errors import ConfigError, DataError

SampleDict = dict[str, Any]

_FORMAT = "slime-rollout-1"
_READABLE = (
    "index",
    "group_index",
    "prompt",
    "response",
    "label",
    "reward",
    "status",
    "response_length",
    "weight_versions",
    "version_spans",
    "remove_sample",
)
# Tokens per sample that are written one by one; `response` has the text of all of them.
SHOWN_TOKENS = 2048

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class RolloutDump:
    """One saved round: its number and its samples, in the order they were saved."""

    rollout_id: int
    samples: list[SampleDict]


def dump_path(template: str, rollout_id: int, *, evaluation: bool = False) -> Path:
    """The file of one round: `{rollout_id}` in `template` becomes `7`; `eval_7` for an evaluation.

    Raises:
        ConfigError: `template` has no `{rollout_id}`: each round would overwrite the last.
    """
    if "{rollout_id}" not in template:
        raise ConfigError(
            f"a rollout data path must contain {{rollout_id}}; found {template!r}. "
            "Write for instance dumps/{rollout_id}.jsonl"
        )
    return Path(
        template.replace("{rollout_id}", f"eval_{rollout_id}" if evaluation else str(rollout_id))
    )


def save_rollout(
    template: str,
    rollout_id: int,
    samples: Iterable[Mapping[str, Any]],
    *,
    evaluation: bool = False,
) -> Path:
    """Write one round's samples; the path written.

    A path ending in `.pt` gets `{"rollout_id", "samples"}` as `torch.save` writes it, of plain
    containers and tensors only, so that `torch.load(path, weights_only=True)` reads it. Any other
    path gets JSON lines: a header, then one sample per line.
    """
    path = dump_path(template, rollout_id, evaluation=evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".pt":
        _save_torch(partial, rollout_id, samples)
    else:
        header = {"format": _FORMAT, "rollout_id": rollout_id}
        with open(partial, "w", encoding="utf-8") as file:
            for row in (header, *samples):
                file.write(json.dumps(row, default=_encode, ensure_ascii=False) + "\n")
    partial.replace(path)  # a reader never sees half a dump
    return path


def load_rollout(
    template: str, rollout_id: int, *, evaluation: bool = False, subsample: float | None = None
) -> RolloutDump:
    """Read what `save_rollout` wrote.

    Args:
        template, rollout_id, evaluation: as given to `save_rollout`.
        subsample: keep this fraction of the groups, the first ones; in (0, 1].

    Raises:
        DataError: no such file, or a file of another kind.
    """
    path = dump_path(template, rollout_id, evaluation=evaluation)
    if not path.is_file():
        raise DataError(f"no rollout data of round {rollout_id}: {path} does not exist")
    dump = _load_torch(path) if path.suffix == ".pt" else _load_json(path)
    if subsample is None:
        return dump
    return RolloutDump(dump.rollout_id, first_groups(dump.samples, subsample))


def first_groups(samples: Sequence[SampleDict], fraction: float) -> list[SampleDict]:
    """The samples of the first `fraction` of the groups, at least one; groups stay whole."""
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"--load-debug-rollout-data-subsample is a fraction in (0, 1]; found {fraction}"
        )
    groups = list(dict.fromkeys(sample.get("group_index") for sample in samples))
    kept = set(groups[: max(1, math.ceil(len(groups) * fraction))])
    return [sample for sample in samples if sample.get("group_index") in kept]


def save_readable_samples(
    folder: Path,
    rollout_id: int,
    samples: Iterable[Mapping[str, Any]],
    *,
    limit: int,
    evaluation: bool = False,
    decode: Decode | None = None,
) -> None:
    """Write what a person reads of a round's first `limit` samples to `{rollout_id}.jsonl`.

    Args:
        decode: token ids to text. With it each row also has, for the first `SHOWN_TOKENS` tokens of
            the response, `pieces` (the text of each token), and `rollout_log_probs` and `loss_mask`
            where the sample has them. 13 microseconds per token, measured on a small vocabulary.
    """
    rows = [
        {name: sample[name] for name in _READABLE if name in sample}
        | (_token_columns(sample, decode) if decode else {})
        for _, sample in zip(range(limit), samples, strict=False)
    ]
    if not rows:
        return
    path = folder / (f"eval_{rollout_id}.jsonl" if evaluation else f"{rollout_id}.jsonl")
    text = "".join(json.dumps(row, default=_encode, ensure_ascii=False) + "\n" for row in rows)
    # A lone surrogate, as a tool's answer may hold one, is no UTF-8: it becomes "?".
    path.write_text(text, encoding="utf-8", errors="replace")


def text_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token; joined they are the text of all.

    A character cut over several tokens belongs to its last one, the others are empty. Each token is
    decoded together with what is before it, because tokenizers drop the space of a first word.
    """
    pieces: list[str] = []
    begin = done = 0  # ids[begin:done] is the context, ids[done:] is not written yet
    for i in range(len(ids)):
        before = decode(list(ids[begin:done])) if done > begin else ""
        text = decode(list(ids[begin : i + 1]))
        if text.endswith("\ufffd") and i + 1 < len(ids) and i - done < _LONGEST_CHARACTER:
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        begin, done = done, i + 1
    return pieces


_LONGEST_CHARACTER = 3  # a character has at most four bytes: three unfinished ones before the last


def _token_columns(sample: Mapping[str, Any], decode: Decode) -> dict[str, Any]:
    length: int = sample.get("response_length") or 0
    tokens: list[int] = sample.get("tokens") or []
    if not 0 < length <= len(tokens):
        return {}
    columns: dict[str, Any] = {
        "pieces": text_pieces(tokens[len(tokens) - length :][:SHOWN_TOKENS], decode)
    }
    log_probs: Sequence[float] | None = sample.get("rollout_log_probs")
    if log_probs is not None:
        columns["rollout_log_probs"] = [round(float(x), 4) for x in log_probs[:SHOWN_TOKENS]]
    loss_mask: Sequence[int] | None = sample.get("loss_mask")
    if loss_mask is not None:
        columns["loss_mask"] = [int(x) for x in loss_mask[:SHOWN_TOKENS]]
    return columns


def _load_json(path: Path) -> RolloutDump:
    with open(path, encoding="utf-8") as file:
        try:
            header, *samples = [json.loads(line, object_hook=_decode) for line in file]
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no rollout data as slime writes it: {error}") from error
    if not isinstance(header, dict) or cast(SampleDict, header).get("format") != _FORMAT:
        raise DataError(f"{path} does not begin with a {_FORMAT} header")
    return RolloutDump(cast(SampleDict, header)["rollout_id"], samples)


def _encode(value: Any) -> Any:
    """JSON for what JSON lacks: arrays keep dtype, shape and every bit."""
    if isinstance(value, np.generic):
        return cast(Any, value).item()
    array = _as_array(value)
    if array is None:
        raise DataError(
            f"a sample holds a {type(value).__name__}, which a rollout dump cannot keep; "
            "plain values, lists, dicts and arrays can be saved"
        )
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"__array__": data, "dtype": array.dtype.str, "shape": array.shape}


def _decode(value: dict[str, Any]) -> Any:
    if "__array__" not in value:
        return value
    data = base64.b64decode(value["__array__"])
    flat: Any = np.frombuffer(data, dtype=np.dtype(value["dtype"]))
    return flat.reshape(value["shape"]).copy()  # what frombuffer returns is read-only


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(value, np.ndarray):
        return cast("np.ndarray[Any, Any]", value)
    # A torch tensor, without importing torch for those who have none.
    return value.detach().cpu().numpy() if hasattr(value, "detach") else None


def _save_torch(path: Path, rollout_id: int, samples: Iterable[Mapping[str, Any]]) -> None:
    import torch

    def as_tensor(value: Any) -> Any:
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # pyright: ignore

    content = {"rollout_id": rollout_id, "samples": [_map(as_tensor, item) for item in samples]}
    torch.save(content, path)


def _load_torch(path: Path) -> RolloutDump:
    import pickle

    import torch

    def as_numpy(value: Any) -> Any:
        # numpy has no bfloat16: such a tensor stays one.
        is_known = isinstance(value, torch.Tensor) and value.dtype is not torch.bfloat16
        return value.numpy() if is_known else value

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        samples = [_map(as_numpy, sample) for sample in content["samples"]]
        return RolloutDump(content["rollout_id"], samples)
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold plain containers and tensors as slime writes them: {error}"
        ) from error


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """A copy of nested dicts and lists with `change` applied to every leaf."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {name: _map(change, item) for name, item in items}
    if isinstance(value, list | tuple):
        return [_map(change, item) for item in cast("Sequence[Any]", value)]
    return change(value.item() if isinstance(value, np.generic) else value)
