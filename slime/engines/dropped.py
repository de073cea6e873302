"""Requests that an abort met before they ran: SGLang refuses them with status 400, which blames the request.

Others it ends with what they have written. Here all of them are answers whose `finish_reason` is `abort`, so that who
sent one need not know how far it had come.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

# sglang 0.5.17, `RequestAbortedError` in managers/tokenizer_manager.py.
_REFUSAL = re.compile(rb"\bRequest \S+ was aborted\b")


def is_dropped(status: int, body: bytes) -> bool:
    """Whether a reply to /generate says that an abort came before the request ran."""
    return status == 400 and _REFUSAL.search(body) is not None


def dropped_answer(payload: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """What SGLang answers to `payload` when an abort comes before the first token.

    A list where the answer to it would be one: several prompts, or `n` above 1.
    """
    prompts = payload.get("input_ids") or payload.get("text")
    is_batch = isinstance(prompts, list) and isinstance(cast(list[Any], prompts)[0], list | str)
    params = payload.get("sampling_params")
    n = cast(dict[str, Any], params).get("n", 1) if isinstance(params, dict) else 1
    answers = [_empty() for _ in range(n * (len(cast(list[Any], prompts)) if is_batch else 1))]
    return answers if is_batch or n > 1 else answers[0]


def _empty() -> dict[str, Any]:
    meta_info: dict[str, Any] = {
        "finish_reason": {"type": "abort", "message": "aborted before it ran"},
        "completion_tokens": 0,
        "output_token_logprobs": [],
    }
    return {"text": "", "output_ids": [], "meta_info": meta_info}
