"""Engines that somebody else runs: what they must be before they are this run's."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.engines.control import EngineControl
from slime.errors import ConfigError

logger = logging.getLogger(__name__)

CHECKED_SGLANG = "0.5.17"  # the release of docs/stock.md
# In front of the version that an engine has between its adoption and its first weights.
_STAMP = "adopted-by-"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks of an engine.

    Attributes:
        kind: `embedded` or `sglang`.
        model_type, architectures: as config.json of --hf-checkpoint has them.
        checkpoint: that folder, for messages.
        gets_weights: a trainer will send some.
        run: a name that no other run has.
    """

    kind: str
    model_type: str | None
    architectures: tuple[str, ...]
    checkpoint: str
    gets_weights: bool
    run: str


def adopt(url: str, wanted: Wanted, *, timeout_s: float) -> None:
    """Make an engine this run's: it fits, and says so by a version of its weights that is ours.

    Raises:
        EngineUnavailable: it does not answer within `timeout_s`.
        EngineProtocolError: it refuses, for instance the key.
        ConfigError: it is something else than the run wants; says what to change.
    """
    control = EngineControl((url,), timeout_s=timeout_s)
    try:
        (server,) = control.get_all("/server_info")
        (model,) = control.get_all("/model_info")
        if problem := misfit(server, model, wanted):
            raise ConfigError(f"--rollout-external-engine-addrs: {url} {problem}")
        if (version := server.get("version")) != CHECKED_SGLANG and wanted.kind == "sglang":
            logger.warning(
                "%s is SGLang %s; slime is checked against %s", url, version, CHECKED_SGLANG
            )
        stamp = {"new_version": _STAMP + wanted.run, "abort_all_requests": False}
        control.post_all("/update_weight_version", stamp)
    finally:
        control.close()


def is_of_run(version: str, run: str) -> bool:
    """Whether an engine with weights of this version is still the one that `run` adopted.

    A server that was started again, or that another run adopted, says something else.
    """
    return version == _STAMP + run or version.isdigit()


def misfit(server: Mapping[str, Any], model: Mapping[str, Any], wanted: Wanted) -> str | None:
    """Why an engine cannot be this run's, and what to change; None when it can.

    Args:
        server, model: its answers to /server_info and /model_info.
    """
    kind = "embedded" if server.get("slime_engine") == "embedded" else "sglang"
    if kind != wanted.kind:
        return (
            f"is the engine {kind}, and the run wants {wanted.kind}; give --rollout-engine {kind}"
        )
    found = (model.get("model_type"), tuple(model.get("architectures") or ()))
    if found != (wanted.model_type, wanted.architectures):
        return (
            f"serves {_model(*found)} ({model.get('model_path')}), and --hf-checkpoint "
            f"{wanted.checkpoint} is {_model(wanted.model_type, wanted.architectures)}; start it with "
            "the same model"
        )
    if server.get("disaggregation_mode") not in (None, "null"):
        return f"does a part of the work only (disaggregation mode {server['disaggregation_mode']})"
    if kind == "embedded" or not wanted.gets_weights:
        return None
    # Brings torch along, which the driver does without.
    from slime.engines.sglang.invitation import RECEIVER

    if (stages := int(server.get("pp_size") or 1)) > 1:
        return f"has {stages} pipeline stages, which weights do not reach yet; start it without"
    if RECEIVER not in (server.get("custom_weight_loader") or ()):
        return (
            f"was started without --custom-weight-loader {RECEIVER}, which takes the trainer's weights "
            "inside of it; start it with that, where slime can be imported. Weights through files, "
            "for servers without, are not built yet"
        )
    return None


def _model(model_type: str | None, architectures: tuple[str, ...]) -> str:
    return f"{model_type} ({', '.join(architectures) or 'no architecture'})"
