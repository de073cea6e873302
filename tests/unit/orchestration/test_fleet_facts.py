from types import SimpleNamespace
from typing import Any, cast

import pytest

from slime.orchestration.engine_fleet import EngineFleet

EMBEDDED = {"slime_engine": "embedded"}
PLAIN = {"enable_deterministic_inference": False}
DETERMINISTIC = {"enable_deterministic_inference": True}


@pytest.mark.parametrize(
    ("infos", "heeds", "group_seeds"),
    [
        ([PLAIN, PLAIN], False, False),
        ([PLAIN, DETERMINISTIC], True, False),
        ([EMBEDDED], True, True),
        ([EMBEDDED, PLAIN], True, False),
        ([], True, False),  # nothing is known yet
    ],
)
def test_what_requests_may_leave_to_the_engines(
    infos: list[dict[str, Any]], heeds: bool, group_seeds: bool
):
    fleet = cast(EngineFleet, SimpleNamespace(_infos=infos))
    assert EngineFleet.heeds_seeds.fget(fleet) is heeds  # pyright: ignore[reportOptionalCall]
    assert EngineFleet.supports_group_seeds.fget(fleet) is group_seeds  # pyright: ignore[reportOptionalCall]
