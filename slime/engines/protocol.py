"""The engine protocol: what slime uses of SGLang's HTTP/JSON interface.

Whatever answers these messages is an engine: stock SGLang on GPUs, `slime.engines.embedded` on
CPUs. Here are the parts a server needs to read requests strictly; nothing here needs torch.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from slime.engines.json_fields import Fields
from slime.errors import EngineProtocolError

Json = dict[str, Any]

DEFAULT_MAX_NEW_TOKENS = 128
GREEDY_TEMPERATURE = 1e-6
NO_LIMIT = 1 << 30


class Endpoint(StrEnum):
    """Paths an engine answers."""

    GENERATE = "/generate"
    ABORT = "/abort_request"
    PAUSE = "/pause_generation"
    CONTINUE = "/continue_generation"
    FLUSH_CACHE = "/flush_cache"
    RELEASE_MEMORY = "/release_memory_occupation"
    RESUME_MEMORY = "/resume_memory_occupation"
    INIT_WEIGHTS_GROUP = "/init_weights_update_group"
    DESTROY_WEIGHTS_GROUP = "/destroy_weights_update_group"
    UPDATE_FROM_DISTRIBUTED = "/update_weights_from_distributed"
    UPDATE_FROM_TENSOR = "/update_weights_from_tensor"
    UPDATE_FROM_DISK = "/update_weights_from_disk"
    UPDATE_WEIGHT_VERSION = "/update_weight_version"
    GET_WEIGHT_VERSION = "/get_weight_version"
    HEALTH = "/health"
    HEALTH_GENERATE = "/health_generate"
    MODEL_INFO = "/model_info"
    GET_MODEL_INFO = "/get_model_info"
    SERVER_INFO = "/server_info"
    GET_SERVER_INFO = "/get_server_info"
    V1_LOADS = "/v1/loads"
    GET_LOADS = "/get_loads"
    MODELS = "/v1/models"
    VERSION = "/version"
    METRICS = "/metrics"


class FinishType(StrEnum):
    """Why a generation ended; `finish_reason.type` of an answer."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class PauseMode(StrEnum):
    """What a pause does with running requests."""

    ABORT = "abort"  # end them with what they have
    RETRACT = "retract"  # keep their tokens, drop their KV; new weights read the tokens again
    IN_PLACE = "in_place"  # keep tokens and KV


class MemoryTag(StrEnum):
    """Parts of an engine's memory that can be released."""

    KV_CACHE = "kv_cache"
    WEIGHTS = "weights"
    CUDA_GRAPH = "cuda_graph"


# --- generation ---

# Sampling parameters of SGLang whose effect the embedded engine lacks: refused, never ignored.
_UNSUPPORTED_SAMPLING = (
    "json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "logit_bias",
)  # fmt: skip
_SAMPLING_NAMES = frozenset(
    (
        "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
        "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "stop", "stop_token_ids",
        "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
        "sampling_seed", "custom_params", "stream_interval", *_UNSUPPORTED_SAMPLING,
    )
)  # fmt: skip
# Top-level fields that would change the answer; unknown others pass (routers add some).
_UNSUPPORTED_FIELDS = (
    "image_data", "video_data", "audio_data", "input_embeds", "lora_path", "session_params",
    "top_logprobs_num", "token_ids_logprob", "return_hidden_states", "return_routed_experts",
    "custom_logit_processor",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample; names, defaults and ranges as in SGLang.

    Attributes:
        max_new_tokens: None means: until the context is full.
        is_length_given: whether the request names `max_new_tokens`; prompt and answer must then fit
            into the context, while the default is cut to what does.
        top_k: `NO_LIMIT` when off; 1 is greedy.
        sampling_seed: None lets the engine choose one.
        custom_params: handed through for custom logit processors; no effect here.
    """

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    is_length_given: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = NO_LIMIT
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None
    custom_params: Json | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether logits change with what was generated so far."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )

    @classmethod
    def from_json(cls, raw: Json) -> "SamplingParams":
        """Checked parameters; a null means the default.

        Raises:
            EngineProtocolError: an unknown name, a wrong type, a value out of range, or something
            unsupported.
        """
        fields = Fields(raw, "sampling_params")
        fields.refuse_unknown(_SAMPLING_NAMES)
        fields.refuse(_UNSUPPORTED_SAMPLING, "the embedded engine cannot do this; leave it out")
        max_new = fields.opt_int("max_new_tokens", DEFAULT_MAX_NEW_TOKENS, low=0)
        if "max_new_tokens" in raw and raw["max_new_tokens"] is None:
            max_new = None
        temperature = fields.number("temperature", 1.0, low=0.0)
        top_k = fields.integer("top_k", -1, low=-1)
        if top_k == 0:
            raise EngineProtocolError(
                "sampling_params.top_k is 0; use -1 for all tokens, 1 for greedy"
            )
        if temperature < GREEDY_TEMPERATURE:
            # As SGLang does it: log-probs of greedy answers are those of the unscaled logits.
            temperature, top_k = 1.0, 1
        return cls(
            max_new_tokens=max_new,
            is_length_given=raw.get("max_new_tokens") is not None,
            temperature=temperature,
            top_p=fields.number("top_p", 1.0, low=0.0, high=1.0, low_is_open=True),
            top_k=NO_LIMIT if top_k == -1 else top_k,
            min_p=fields.number("min_p", 0.0, low=0.0, high=1.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2.0, high=2.0),
            presence_penalty=fields.number("presence_penalty", 0.0, low=-2.0, high=2.0),
            repetition_penalty=fields.number(
                "repetition_penalty", 1.0, low=0.0, high=2.0, low_is_open=True
            ),
            min_new_tokens=fields.integer(
                "min_new_tokens", 0, low=0, high=NO_LIMIT if max_new is None else max_new
            ),
            n=fields.integer("n", 1, low=1),
            stop=fields.strings("stop"),
            stop_token_ids=fields.integers("stop_token_ids"),
            ignore_eos=fields.boolean("ignore_eos", False),
            skip_special_tokens=fields.boolean("skip_special_tokens", True),
            spaces_between_special_tokens=fields.boolean("spaces_between_special_tokens", True),
            no_stop_trim=fields.boolean("no_stop_trim", False),
            sampling_seed=fields.opt_int("sampling_seed", None),
            custom_params=fields.opt_object("custom_params"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRequest:
    """One prompt of a /generate call; asks for `params.n` answers.

    Attributes:
        rid: request id; None lets the engine choose.
        seeds: one per answer, or empty: then derived from `params.sampling_seed`.
    """

    rid: str | None
    input_ids: tuple[int, ...] | None
    text: str | None
    params: SamplingParams
    seeds: tuple[int, ...]
    return_logprob: bool
    logprob_start_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """A whole /generate call.

    Attributes:
        as_list: answer with a list: several prompts, or n > 1.
    """

    prompts: tuple[PromptRequest, ...]
    as_list: bool
    stream: bool

    @classmethod
    def from_json(cls, raw: object) -> "GenerateCall":
        """The call a body describes.

        Raises:
            EngineProtocolError: what is wrong with it and where.
        """
        fields = Fields(raw, "")
        fields.refuse(_UNSUPPORTED_FIELDS, "the embedded engine cannot do this; leave it out")
        prompts = _prompts(fields)
        num = len(prompts) if prompts.is_batch else 1
        params = _per_prompt(fields, "sampling_params", num)
        rids = _rids(fields, num)
        seeds = fields.raw.get("sampling_seeds")
        return_logprob = fields.boolean("return_logprob", False)
        start_len = fields.integer("logprob_start_len", -1, low=-1)
        parsed = {id(p): SamplingParams.from_json(cast(Json, p or {})) for p in params}
        requests = tuple(
            PromptRequest(
                rid=rids[i],
                input_ids=prompts.ids[i],
                text=prompts.texts[i],
                params=parsed[id(params[i])],
                seeds=_seeds(seeds, i if prompts.is_batch else None, parsed[id(params[i])].n),
                return_logprob=return_logprob,
                logprob_start_len=start_len,
            )
            for i in range(num)
        )
        as_list = prompts.is_batch or requests[0].params.n > 1
        return cls(prompts=requests, as_list=as_list, stream=fields.boolean("stream", False))


@dataclass(frozen=True, slots=True)
class _Prompts:
    ids: list[tuple[int, ...] | None]
    texts: list[str | None]
    is_batch: bool

    def __len__(self) -> int:
        return len(self.ids)


def _prompts(fields: Fields) -> _Prompts:
    ids, text = fields.raw.get("input_ids"), fields.raw.get("text")
    if (ids is None) == (text is None):
        raise EngineProtocolError(
            "a /generate call needs one of `input_ids` and `text`, and not both"
        )
    if ids is None:
        texts = fields.strings("text")
        if not texts:
            raise EngineProtocolError("`text` is an empty list; give at least one prompt")
        return _Prompts([None] * len(texts), list(texts), not isinstance(text, str))
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        rows = [_token_ids(row, f"input_ids[{i}]") for i, row in enumerate(cast(list[object], ids))]
        return _Prompts(cast(list[tuple[int, ...] | None], rows), [None] * len(rows), True)
    return _Prompts([_token_ids(cast(object, ids), "input_ids")], [None], False)


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise EngineProtocolError(
            f"{where} must be a list of at least one token id, got {value!r:.80}"
        )
    ids = tuple(cast(list[Any], value))
    # set(map(type)) runs in C: prompts have thousands of ids.
    if set(map(type, ids)) != {int} or min(ids) < 0:
        raise EngineProtocolError(f"{where} must hold only token ids (integers >= 0)")
    return ids


def _per_prompt(fields: Fields, name: str, num: int) -> list[object]:
    value = fields.raw.get(name)
    if not isinstance(value, list):
        return [value] * num
    values = cast(list[object], value)
    if len(values) != num:
        raise EngineProtocolError(
            f"{name} is a list of {len(values)} for {num} prompts; give one each"
        )
    return values


def _rids(fields: Fields, num: int) -> list[str | None]:
    value = fields.raw.get("rid")
    if isinstance(value, str) and num > 1:
        return [f"{value}_{i}" for i in range(num)]
    rids = _per_prompt(fields, "rid", num)
    if not all(rid is None or isinstance(rid, str) for rid in rids):
        raise EngineProtocolError(f"rid must be a string or a list of strings, got {value!r:.80}")
    return cast(list[str | None], rids)


def _seeds(value: object, row: int | None, n: int) -> tuple[int, ...]:
    """Seeds of one prompt's answers; in a batch, row i of a list of lists."""
    if value is None:
        return ()
    if row is not None:
        rows = cast(list[object], value) if isinstance(value, list) else []
        value = rows[row] if row < len(rows) else None
    if not isinstance(value, list) or len(cast(list[object], value)) != n:
        raise EngineProtocolError(
            f"sampling_seeds must hold one integer per answer (n = {n}; a list of such lists for "
            f"several prompts), got {value!r:.80}"
        )
    seeds = tuple(cast(list[Any], value))
    if not all(type(seed) is int for seed in seeds):
        raise EngineProtocolError(f"sampling_seeds must be integers, got {value!r:.80}")
    return seeds


# --- answers ---


def finish_stop(matched: int | str) -> Json:
    """Ended by a stop token (its id) or a stop string."""
    return {"type": FinishType.STOP.value, "matched": matched}


def finish_length(length: int) -> Json:
    """Ended by `max_new_tokens` or a full context."""
    return {"type": FinishType.LENGTH.value, "length": length}


def finish_abort(message: str, status_code: int | None = None) -> Json:
    """Ended from outside; the answer holds what was generated until then."""
    return {
        "type": FinishType.ABORT.value,
        "message": message,
        "status_code": status_code,
        "err_type": None,
    }


def update_answer(success: bool, message: str, checksums: dict[str, int] | None = None) -> Json:
    """Answer to a weight update; checksums are of what the engine holds after loading."""
    return {"success": success, "message": message, "checksums": checksums or {}}


def error_answer(message: str, kind: str) -> Json:
    """Body of an answer with an error status."""
    return {"error": {"message": message, "type": kind}, "message": message}
