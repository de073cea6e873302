"""AgentConfig: agents that speak OpenAI's or Anthropic's API, and the endpoint they speak to."""

from dataclasses import dataclass
from typing import Literal

from slime.config.fields import flag

# The generate function that --agent-function-path implies.
AGENT_GENERATE = "slime.agent.generate.generate"


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Agents."""

    agent_function_path: str | None = flag(
        None,
        "Function that runs an agent on one sample: async fn(session, sample); "
        "--custom-generate-function-path is then slime.agent.generate.generate.",
    )
    agent_host: str = flag(
        "127.0.0.1",
        "Address at which the endpoint for agents listens, on the node of the rollout; agents get it "
        "in their session's address.",
    )
    agent_port: int = flag(0, "Port of that endpoint; 0 takes a free one.", at_least=0)
    agent_sampling: Literal["refuse", "run", "request"] = flag(
        "refuse",
        "Where a request of an agent wants other sampling parameters than the run's: refuse it; the "
        "run's hold; or the request's hold, and its answer does not train.",
    )
