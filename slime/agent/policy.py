"""Whose sampling parameters hold: the run's, unless it was told otherwise.

A policy is trained on the distribution it was sampled from: the trainer divides logits by the run's
temperature, so tokens sampled otherwise have log-probs that belong to another distribution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slime.agent.asked import ApiError

SamplingPolicy = Literal["refuse", "run", "request"]

# What each is when nobody sets it.
NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


@dataclass(frozen=True)
class Settled:
    """How one request is sampled.

    Attributes:
        params: for `/generate`.
        differing: names in which request and run differ.
        is_run: it is sampled as the run samples.
    """

    params: dict[str, Any]
    differing: tuple[str, ...]
    is_run: bool


def settle(run: Mapping[str, Any], asked: Mapping[str, float], policy: SamplingPolicy) -> Settled:
    """The run's parameters and the request's, by `policy`.

    Args:
        run: sampling parameters of the run or the evaluation.
        asked: those the request names.
        policy: for where they differ: "refuse" the request; take the "run"'s; or the "request"'s.

    Raises:
        ApiError: they differ, and the policy is to refuse.
    """
    differing = tuple(
        name for name, value in asked.items() if value != run.get(name, NEUTRAL[name])
    )
    if differing and policy == "refuse":
        name = differing[0]
        raise ApiError(
            f"{name}: the request wants {asked[name]:g}, the run samples with "
            f"{run.get(name, NEUTRAL[name]):g}, and what is sampled otherwise cannot be trained on; "
            "leave it out, or start the run with --agent-sampling run (the run's value holds) or "
            "request (the request's holds, and its answer does not train)",
            param=name,
            code="unsupported_value",
        )
    if policy == "request":
        return Settled(
            dict(run) | {name: asked[name] for name in differing}, differing, not differing
        )
    return Settled(dict(run), differing, True)
