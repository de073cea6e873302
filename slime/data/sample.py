"""Sample: one prompt with one response, and everything that must stay aligned with its tokens."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self, cast

import numpy as np

from slime.data.packed import PackableList, Packed, pack, row_sum, stored
from slime.data.versions import Span, extended_spans, spans_of_answer
from slime.errors import DataError, EngineProtocolError

_LISTS = (list, tuple, np.ndarray)
_PACKABLE = ("tokens", "loss_mask", "rollout_log_probs")
_PER_TOKEN = (
    *("loss_mask", "rollout_log_probs", "teacher_log_probs"),
    *("rollout_top_p_token_ids", "rollout_top_p_token_offsets"),
)


@dataclass
class SpecInfo:
    """Speculative decoding counters, summed over the engine calls of one sample."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    def add(self, meta_info: Mapping[str, Any]) -> None:
        """Count one engine answer; answers without speculative decoding change nothing."""
        if "spec_verify_ct" not in meta_info:
            return
        self.spec_accept_token_num += int(meta_info.get("spec_accept_token_num", 0))
        self.spec_draft_token_num += int(meta_info.get("spec_draft_token_num", 0))
        self.spec_verify_ct += int(meta_info["spec_verify_ct"])
        self.completion_token_num += int(meta_info.get("completion_tokens", 0))

    @property
    def spec_accept_rate(self) -> float:
        """Accepted share of the drafted tokens, 0.0 when nothing was drafted."""
        return self.spec_accept_token_num / max(self.spec_draft_token_num, 1)

    @property
    def spec_accept_length(self) -> float:
        """Tokens written per verification, 0.0 when nothing was verified."""
        return self.completion_token_num / max(self.spec_verify_ct, 1)


@dataclass
class PrefixCacheInfo:
    """Prompt tokens the engines found in their cache, summed over the calls of one sample."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    def add(self, meta_info: Mapping[str, Any]) -> None:
        """Count one engine answer."""
        self.cached_tokens += int(meta_info.get("cached_tokens") or 0)
        self.total_prompt_tokens += int(meta_info.get("prompt_tokens") or 0)

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Cached share of all prompt tokens."""
        return self.cached_tokens / max(self.total_prompt_tokens, 1)


@dataclass
class Sample:
    """One prompt with one response (R tokens, tool outputs included; S = prompt + response).

    Attributes:
        group_index, index: prompt group and sample; monotonic, given by the data source.
        rollout_id: execution it was cut from; siblings of a fan-out share it; None = its own.
        prompt: rendered text, or messages when no chat template was applied.
        tokens: [S] ids. A fresh sample of the data source already holds its prompt ids here.
        response, response_length: text, and R.
        reward: a number, or a dict from which `reward_key` picks one.
        loss_mask: [R], 1 = train on this token; None = all ones.
        weight_versions: one per engine call.
        version_spans: (first response token, weight version), each up to the next one's; filled by
            `append_response_tokens`. "" is what no engine wrote, "3..4" what version 3 began and 4
            ended, the split not being known, "?" what nobody told the version of. Tokens that are
            added by hand count to the span before them.
        rollout_log_probs: [R] natural log, by the engine; 0.0 for what the model did not write.
        rollout_top_p_token_ids, rollout_top_p_token_offsets: nucleus of each token, ragged;
            [R + 1] offsets.
        rollout_routed_experts: int32 [S - 1, layers, topk]; a row of -1 was not recorded.
        remove_sample: count the sample, but train on none of its tokens.
        teacher_log_probs: [R] natural log.
        session_id: routing key of the router.
        non_generation_time: seconds spent on tools.
        train_metadata: handed to the trainer as it is.
    Other attributes may be set freely; `to_dict` keeps them.

    Long lists of an answered sample lie packed (`pack`); whoever reads the attribute gets the list.
    """

    class Status(StrEnum):
        """How far a sample has come."""

        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list[int])
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    multimodal_train_input_id: str | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list[str])
    rollout_log_probs: list[float] | None = None
    rollout_top_p_token_ids: list[int] | None = None
    rollout_top_p_token_offsets: list[int] | None = None
    rollout_routed_experts: np.ndarray[Any, np.dtype[np.int32]] | None = None
    remove_sample: bool = False
    teacher_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)
    usage: dict[str, float] | None = None
    version_spans: list[Span] = field(default_factory=list[Span])

    @property
    def prompt_length(self) -> int:
        """Tokens before the response."""
        return len(stored(self, "tokens")) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Response tokens that train."""
        mask = stored(self, "loss_mask")
        return self.response_length if mask is None else int(row_sum(mask))

    def pack(self) -> None:
        """Keep long lists of tokens, masks and log-probs as arrays until somebody reads them."""
        pack(self, _PACKABLE)

    def get_reward_value(self, args: Any, *, evaluation: bool = False) -> float:
        """The scalar reward: `reward` itself, or its entry `args.reward_key`.

        Args:
            args: has `reward_key`, and `eval_reward_key` if `evaluation`.
            evaluation: prefer `eval_reward_key`.

        Raises:
            DataError: there is no reward, or the key does not fit it.
        """
        key = (args.eval_reward_key if evaluation else None) or args.reward_key
        if isinstance(self.reward, dict):
            if key not in self.reward:
                raise DataError(
                    f"sample {self.index}: --reward-key {key} is not among the keys of its reward, "
                    f"{sorted(self.reward)}"
                )
            return float(self.reward[key])
        if self.reward is None:
            raise DataError(f"sample {self.index} ({self.status}) has no reward yet")
        return float(self.reward)

    def append_response_tokens(
        self,
        args: Any,
        *,
        tokens: Sequence[int],
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append what a model wrote (trainable) or a tool said (not), in every parallel list.

        Args:
            args: the flat namespace; `num_layers` is read if `meta_info` has routed experts, and
                `update_weight_pause_mode`.
            tokens: [n] ids.
            log_probs: [n] natural log; left out, those that `meta_info` holds are taken.
            trainable: False writes 0 into the loss mask and 0.0 as log-prob.
            meta_info: of the engine's answer: its weight versions and counters are taken over.
            text: appended to `response`.
            update_terminal_info: set `status` from the finish reason in `meta_info`.

        Raises:
            DataError: lengths differ, or only some of the trainable tokens have log-probs.
            EngineProtocolError: the answer contradicts itself.
            In both cases the sample is unchanged.
        """
        meta_info = meta_info or {}
        tokens = list(tokens)
        if trainable and log_probs is None:
            log_probs = _log_probs_of(meta_info, tokens)
        new_log_probs = self._extended_log_probs(len(tokens), log_probs, trainable)
        status = _status_of(meta_info) if update_terminal_info else None
        experts = self._extended_experts(args, len(tokens), meta_info)
        added = spans_of_answer(meta_info, trainable=trainable, pause_mode=_pause_mode(args))
        spans = extended_spans(self.version_spans, self.response_length, added, len(tokens))

        if not trainable or self.loss_mask is not None:
            # The first token that does not train turns "None = all ones" into a list.
            before = [1] * self.response_length if self.loss_mask is None else self.loss_mask
            self.loss_mask = before + [int(trainable)] * len(tokens)
        self.rollout_log_probs = new_log_probs
        self.rollout_routed_experts = experts
        self.version_spans = spans
        if self.rollout_top_p_token_offsets is not None:
            offsets = self.rollout_top_p_token_offsets
            self.rollout_top_p_token_offsets = offsets + offsets[-1:] * len(tokens)
        if tokens:
            # It scored a shorter response; the teacher has to be asked again.
            self.teacher_log_probs = None
        self.tokens = self.tokens + tokens
        self.response_length += len(tokens)
        self.response += text or ""
        self._count(meta_info)
        self.status = status or self.status

    def _extended_log_probs(
        self, num_tokens: int, log_probs: Sequence[float] | None, trainable: bool
    ) -> list[float] | None:
        """`rollout_log_probs` with `num_tokens` more entries; None while no token has any."""
        if log_probs is not None and len(log_probs) != num_tokens:
            raise DataError(
                f"sample {self.index}: {num_tokens} tokens with {len(log_probs)} log_probs"
            )
        before = self.rollout_log_probs
        if not trainable:
            return None if before is None else before + [0.0] * num_tokens
        if log_probs is None:
            if before is not None and num_tokens:
                raise DataError(
                    f"sample {self.index}: trainable tokens without log_probs after {len(before)} "
                    "tokens that have them; request return_logprob for every turn, or append with "
                    "trainable=False"
                )
            return before
        if before is None:
            if self.effective_response_length:
                raise DataError(
                    f"sample {self.index}: log_probs for a later turn only; the first "
                    f"{self.response_length} response tokens have none"
                )
            before = [0.0] * self.response_length
        return before + [float(value) for value in log_probs]

    def _extended_experts(
        self, args: Any, num_tokens: int, meta_info: Mapping[str, Any]
    ) -> np.ndarray[Any, np.dtype[np.int32]] | None:
        """Routed experts after this append: recorded rows, then rows of -1 up to S - 1."""
        num_rows = len(stored(self, "tokens")) + num_tokens - 1
        experts = self.rollout_routed_experts
        if (encoded := meta_info.get("routed_experts")) is not None:
            flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
            start = int(meta_info.get("routed_experts_start_len") or 0)
            rows = num_rows - start
            if rows <= 0 or flat.size % (rows * args.num_layers):
                raise EngineProtocolError(
                    f"sample {self.index}: {flat.size} routed experts do not fit {rows} tokens x "
                    f"{args.num_layers} layers"
                )
            new = flat.reshape(rows, args.num_layers, -1)
            known = None if experts is None else experts[:start]
            experts = new if known is None else np.concatenate([known, new])
        if experts is None or len(experts) >= num_rows:
            return experts
        return np.pad(experts, ((0, num_rows - len(experts)), (0, 0), (0, 0)), constant_values=-1)

    def _count(self, meta_info: Mapping[str, Any]) -> None:
        if meta_info.get("weight_version") is not None:
            self.weight_versions = [*self.weight_versions, str(meta_info["weight_version"])]
        self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)

    def validate(self, *, vocab_size: int | None = None, entries: bool = True) -> None:
        """Check that every parallel list fits, and that its entries can be what they say.

        Args:
            vocab_size: ids are below it; None = not known.
            entries: False leaves them out, where a caller has checked those of many samples at
                once.

        Raises:
            DataError: naming the first list that does not, and what was found.
        """
        self._check_kinds()
        self._check_lengths()
        if entries:
            self._check_all_entries(vocab_size)
        if isinstance(self.reward, float) and not math.isfinite(self.reward):
            raise DataError(f"sample {self.index}: its reward is {self.reward}, which is no number")

    def _check_all_entries(self, vocab_size: int | None) -> None:
        self._check_entries("tokens", "iu", 0, None if vocab_size is None else vocab_size - 1)
        self._check_entries("loss_mask", "iub", 0, 1)
        self._check_entries("rollout_log_probs", "fiu", None, None)
        self._check_entries("teacher_log_probs", "fiu", None, None)

    def _check_entries(self, name: str, kinds: str, low: int | None, high: int | None) -> None:
        """Check that a list holds finite numbers of the given numpy kinds in [low, high]."""
        value = stored(self, name)
        if value is None or not len(value):
            return
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths inside
            array = np.asarray([None])
        if array.dtype.kind not in kinds or array.ndim != 1:
            raise DataError(
                f"sample {self.index}: {name} must be a list of numbers, found {value!r:.80}"
            )
        bad = ~np.isfinite(array)
        bad |= False if low is None else array < low
        bad |= False if high is None else array > high
        if bad.any():
            place = int(np.argmax(bad))
            limits = "finite" if low is None else f"in {low} ... {'' if high is None else high}"
            raise DataError(
                f"sample {self.index}: {name}[{place}] is {array[place]}; it must be {limits}"
            )

    def _check_kinds(self) -> None:
        """Check that what must be a list is one, and that R is a whole number."""
        length = cast(object, self.response_length)
        if isinstance(length, bool) or not isinstance(length, int):
            raise DataError(f"sample {self.index}: response_length is {length!r:.80}, no number")
        tokens = stored(self, "tokens")
        if not isinstance(tokens, _LISTS):
            raise DataError(f"sample {self.index}: tokens must be a list, found {tokens!r:.80}")
        for name in (*_PER_TOKEN, "rollout_routed_experts"):
            value = stored(self, name)
            if value is not None and not isinstance(value, _LISTS):
                raise DataError(f"sample {self.index}: {name} must be a list, found {value!r:.80}")

    def _check_lengths(self) -> None:
        num_tokens = len(stored(self, "tokens"))
        expected = {
            "loss_mask": self.response_length,
            "rollout_log_probs": self.response_length,
            "teacher_log_probs": self.response_length,
            "rollout_top_p_token_offsets": self.response_length + 1,
            "rollout_routed_experts": num_tokens - 1,
        }
        if not 0 <= self.response_length <= num_tokens:
            raise DataError(
                f"sample {self.index}: response_length {self.response_length} with "
                f"{num_tokens} tokens"
            )
        firsts = [first for first, _ in self.version_spans]
        if firsts != sorted(set(firsts)) or any(not 0 <= i < self.response_length for i in firsts):
            raise DataError(
                f"sample {self.index}: version_spans {self.version_spans!r:.120} must begin at "
                f"different tokens of the {self.response_length} of its response, in their order"
            )
        for name, length in expected.items():
            value = stored(self, name)
            if value is not None and len(value) != length:
                raise DataError(
                    f"sample {self.index}: {name} has {len(value)} entries, expected {length} "
                    f"({num_tokens} tokens, response_length {self.response_length})"
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields and extra attributes: the status as its value, counters as dicts. Not deep."""
        lists = {n: row.tolist() for n, row in vars(self).items() if type(row) is Packed}
        return self.to_dict_packed() | lists

    def to_dict_packed(self) -> dict[str, Any]:
        """As `to_dict`, with packed lists as `Packed`: what to keep when the samples may change."""
        return vars(self) | {
            "status": self.status.value,
            "spec_info": dict(vars(self.spec_info)),
            "prefix_cache_info": dict(vars(self.prefix_cache_info)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; keys that are no field become attributes.

        Raises:
            DataError: a status or a counter that does not exist.
        """
        names = {item.name for item in fields(cls)}
        known = {name: value for name, value in data.items() if name in names}
        try:
            known["status"] = cls.Status(known.get("status", "pending"))
            for name, kind in (("spec_info", SpecInfo), ("prefix_cache_info", PrefixCacheInfo)):
                if isinstance(known.get(name), dict):
                    known[name] = kind(**known[name])
            if spans := known.get("version_spans"):  # JSON has made lists of the pairs
                known["version_spans"] = [(int(first), str(version)) for first, version in spans]
        except (TypeError, ValueError) as error:  # no such status, no such counter, no spans
            raise DataError(f"this is no sample: {error}; found {known!r:.200}") from error
        sample = cls(**known)
        vars(sample).update({name: value for name, value in data.items() if name not in names})
        return sample


# After the class was made: a descriptor in its body would be taken for the field's default.
for _name in _PACKABLE:
    setattr(Sample, _name, PackableList(_name, getattr(Sample, _name, MISSING)))

Status = Sample.Status

_STATUS_OF_FINISH_REASON = {
    "stop": Status.COMPLETED,
    "length": Status.TRUNCATED,
    "abort": Status.ABORTED,
}


def _log_probs_of(meta_info: Mapping[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """Log-probs of an engine's answer, checked to belong to `tokens`; None if it has none."""
    entries = meta_info.get("output_token_logprobs")
    if entries is None:
        return None
    if [entry[1] for entry in entries] != list(tokens):
        raise EngineProtocolError(
            f"{len(tokens)} tokens were appended, but the {len(entries)} output_token_logprobs of "
            "the same answer belong to other ids"
        )
    return [float(entry[0]) for entry in entries]


def _pause_mode(args: Any) -> str | None:
    """`--update-weight-pause-mode`; args that somebody else made may not have it."""
    return (
        None if args is None else cast(dict[str, Any], vars(args)).get("update_weight_pause_mode")
    )


def _status_of(meta_info: Mapping[str, Any]) -> Status | None:
    """Status for the finish reason of an answer; None if it has none (a part of a stream)."""
    reason = meta_info.get("finish_reason")
    if reason is None:
        return None
    kind = cast(Any, reason).get("type") if isinstance(reason, dict) else reason
    if kind not in _STATUS_OF_FINISH_REASON:
        raise EngineProtocolError(
            f"finish_reason {reason!r}: expected one of {sorted(_STATUS_OF_FINISH_REASON)}"
        )
    return _STATUS_OF_FINISH_REASON[kind]
