"""An agent of pydantic-ai with one tool, as its documentation has them; it knows nothing of training.

It is asked for the letter in the middle of five, and may have them sorted first.
"""

from typing import TYPE_CHECKING, Any

from pydantic_ai import Agent, UsageLimits
from pydantic_ai.exceptions import AgentRunError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

if TYPE_CHECKING:
    from slime.agent import Session
    from slime.data.sample import Sample

agent = Agent()
# More requests than that and it has lost its way.
LIMITS = UsageLimits(request_limit=4)


@agent.tool_plain
def sort(letters: str) -> str:
    """The letters in the order of the alphabet."""
    return "".join(sorted(letters))


async def run_agent(session: "Session", sample: "Sample") -> float:
    """For --agent-function-path: the agent on one question, and 1.0 if its final answer is right."""
    provider = AnthropicProvider(base_url=session.anthropic_base_url, api_key=session.api_key)
    model = AnthropicModel("policy", provider=provider)
    question: Any = (
        sample.prompt[-1]["content"] if isinstance(sample.prompt, list) else sample.prompt
    )
    try:
        result = await agent.run(question, model=model, usage_limits=LIMITS)
    except AgentRunError:  # the model went in circles, or said nothing
        return 0.0
    return float(result.output.strip() == sample.label)
