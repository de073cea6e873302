"""Which engine the router gives a request: the policy taken unless told, and who looks at a session's key.

Engines that generate without a pause need requests spread by what is in flight, not by turns: answers differ in
length, so `round_robin` leaves one engine with a queue and the other with free places (measured in
benchmarks/results/routing.md). smg's `manual` with `min_load` goes by the router's own count of requests.
"""

from collections.abc import Mapping
from typing import Any

# Those that look at the key; --router-sticky-sessions lets the others look too.
_KEYED_POLICIES = frozenset({"consistent_hashing", "manual"})
# A session that was quiet for so long gets an engine anew; its key would stay in the router for four hours.
_IDLE_S = 3600


def router_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with a policy: new sessions go to the engine with the fewest requests, and stay there.

    Args:
        given: `--router-*` options without the prefix. A policy in them is kept; `manual` gets the
            assignment mode `min_load` unless there is one.
    """
    options = {"policy": "manual", **given}
    if options["policy"] == "manual":
        options = {"assignment_mode": "min_load", "max_idle_secs": _IDLE_S, **options}
    return options


def looks_at_sessions(options: Mapping[str, Any]) -> bool:
    """Whether a router with these options takes the key of a session into account."""
    return options.get("policy") in _KEYED_POLICIES or bool(options.get("routing_key_override"))
