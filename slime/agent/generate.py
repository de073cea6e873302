"""The generate function behind --agent-function-path: a session around the user's agent."""

from typing import Any

from slime.agent.session import agent_session
from slime.data.sample import Sample
from slime.errors import DataError
from slime.plugins import accepts_keyword, load_function

# In Sample.metadata: how often the run's sampling parameters went before a request's, by name.
OVERRIDDEN = "agent_overridden"


async def generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """One Sample per branch of the agent's conversation; in an evaluation the latest one alone.

    A number or a dict that the agent returns is the reward of all of them; otherwise the reward function
    judges. Its errors fail the sample, unless they come from the end of a round.

    Raises:
        DataError: the agent asked nothing, or returned something else.
    """
    agent = load_function(args.agent_function_path)
    keywords = {"evaluation": evaluation} if accepts_keyword(agent, "evaluation") else {}
    reward: Any = None
    async with agent_session(args, sample, sampling_params, evaluation=evaluation) as session:
        try:
            reward = await agent(session, sample, **keywords)
        except Exception:
            if not (session.is_aborted or session.fault):
                raise
    samples = session.samples()
    if session.is_aborted:
        return samples
    _set_reward(samples, reward, args.agent_function_path)
    if session.overridden:
        samples[0].metadata[OVERRIDDEN] = dict(session.overridden)
    if evaluation:
        return samples[-1]
    return samples if len(samples) > 1 else samples[0]


def _set_reward(samples: list[Sample], reward: Any, path: str) -> None:
    if reward is None:
        return
    if isinstance(reward, bool) or not isinstance(reward, int | float | dict):
        raise DataError(
            f"{path} returned {reward!r:.80}; it returns nothing, or the reward: a number or a dict"
        )
    for sample in samples:
        sample.reward = dict(reward) if isinstance(reward, dict) else float(reward)
