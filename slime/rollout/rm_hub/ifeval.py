"""`--rm-type ifeval`, also under the name `ifbench`: 1.0 if the response follows all its instructions."""

from collections.abc import Mapping
from typing import Any, cast

from slime.data.sample import Sample
from slime.rollout.rm_hub.answers import answer_part
from slime.rollout.rm_hub.base import BadReward
from slime.rollout.rm_hub.instructions import CHECKS, words


async def reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. A response without a word follows nothing; thinking does not count.

    `metadata["instruction_id_list"]` names the instructions and `metadata["kwargs"]` has a dict for
    each, as in the published rows; the label may be such a dict instead.

    Raises:
        BadReward: the row has no instructions, or one that nobody here can check. It fails by name:
            left out, it would count as followed.
    """
    text = answer_part(sample.response)
    checks = [(CHECKS[name], given) for name, given in _instructions(sample)]
    if not words(text):
        return 0.0
    try:
        return float(all(check(text, given) for check, given in checks))
    except (KeyError, TypeError, ValueError) as error:
        names = sample.metadata.get("instruction_id_list")
        raise BadReward("bad_label", f"arguments do not fit {names}: {error!r}") from error


def _instructions(sample: Sample) -> list[tuple[str, Mapping[str, Any]]]:
    label: Any = sample.label
    row = sample.metadata if "instruction_id_list" in sample.metadata else label
    if not isinstance(row, Mapping) or not row.get("instruction_id_list"):
        raise BadReward("missing_label", f"sample {sample.index} has no instruction_id_list")
    fields = cast(Mapping[str, Any], row)
    names = [str(name) for name in fields["instruction_id_list"]]
    given = [dict(item or {}) for item in fields.get("kwargs") or [{}] * len(names)]
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise BadReward(
            "unknown_instruction",
            f"no check for {', '.join(unknown)}; known: {', '.join(CHECKS)}",
        )
    if len(given) != len(names):
        raise BadReward("bad_label", f"{len(names)} instructions, but {len(given)} kwargs")
    return list(zip(names, given, strict=True))
