"""What OpenAI's two APIs share: errors, sampling parameters, tools."""

from typing import Any, cast

from slime.agent.apis import Json
from slime.agent.asked import ApiError
from slime.agent.body import Body

_TYPES = {401: "authentication_error", 404: "not_found_error"}
_CODES = {401: "invalid_api_key", 404: "not_found"}
# About the request, not about the answer.
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"),
    "prompt_cache_retention",
)
CANNOT_FORCE = "the engine cannot be made to call a tool"
ONE_ANSWER = "one answer per request"


def error_object(error: ApiError) -> Json:
    """As OpenAI's clients expect it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(error.status, kind),
            "param": error.param,
            "code": error.code or _CODES.get(error.status),
        }
    }


def take_sampling(body: Body) -> dict[str, float]:
    """The sampling parameters that a request names, by SGLang's names."""
    found = {
        "temperature": body.number("temperature", 0, 2),
        "top_p": body.number("top_p", 0, 1),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "presence_penalty": body.number("presence_penalty", -2, 2),
    }
    return {name: value for name, value in found.items() if value is not None}


def take_tools(body: Body, *, nested: bool) -> list[dict[str, Any]] | None:
    """Function tools in the form of chat completions, which chat templates know.

    Args:
        nested: they stand below "function", as in chat completions.
    """
    tools: list[dict[str, Any]] = []
    for number, raw in enumerate(cast(list[Any], body.take("tools", list) or [])):
        outer = Body(raw, f"tools[{number}].")
        outer.only("type", ("function",), "tools of the provider's own do not run here")
        inner = outer
        if nested:
            inner = Body(outer.take("function", dict, required=True), f"tools[{number}].function.")
            outer.done()
        function: dict[str, Any] = {"name": inner.text("name")}
        function["description"] = inner.take("description", str) or ""
        function["parameters"] = inner.take("parameters", dict) or {
            "type": "object",
            "properties": {},
        }
        # Clients set `strict` on their own. Here, as with any model that errs, it is the agent who
        # checks the arguments.
        inner.ignore("strict")
        inner.done()
        tools.append({"type": "function", "function": function})
    return tools or None


def take_tool_choice(body: Body) -> bool:
    """Whether the answer may call tools."""
    return body.only("tool_choice", ("auto", "none"), CANNOT_FORCE) != "none"
