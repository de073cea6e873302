"""Several solvers and a judge, all played by the one model that trains.

The solvers answer the question at the same time; the judge sees the question with their answers and gives
the final one. Each agent's words are a sample of their own; together they are one execution.
"""

import asyncio
from collections import defaultdict
from typing import Any

from slime.rollout.turns import Turns, sibling_of
from slime.utils.types import Sample

ROLE = "role"


async def generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """All agents' samples, the judge last; in an evaluation the judge alone, whose word counts.

    Args:
        args: has `num_solvers` and `judge_prompt` (a template with {question} and {answers}) from
            --custom-config-path.
    """
    question = sample.prompt
    if isinstance(question, str):
        raise ValueError("the judge's prompt is made of messages: leave --apply-chat-template out")

    async def answer(agent: Sample) -> None:
        await Turns(args, agent, sampling_params, evaluation=evaluation).ask()

    solvers = [agent_of(sample, "solver", question) for _ in range(args.num_solvers)]
    await asyncio.gather(*map(answer, solvers))
    if any(solver.status is Sample.Status.ABORTED for solver in solvers):
        return solvers  # the round is full; the group will be asked afresh
    told = args.judge_prompt.format(
        question=question[-1]["content"], answers=",".join(map(final_answer, solvers))
    )
    judge = agent_of(sample, "judge", [*question[:-1], {"role": "user", "content": told}])
    await answer(judge)
    return judge if evaluation else [*solvers, judge]


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 for an agent whose own answer is right and was ended by itself."""
    is_ended = sample.status is Sample.Status.COMPLETED
    return float(is_ended and final_answer(sample) == sample.label)


def by_role(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """(raw rewards, rewards less the mean of the same role on the same prompt).

    A judge has an easier task than a solver: one mean for both would reward the role, not the answer.
    """
    raw = [0.0 if s.reward is None else s.get_reward_value(args) for s in samples]
    peers: defaultdict[Any, list[float]] = defaultdict(list)
    keys = [(sample.group_index, sample.metadata.get(ROLE)) for sample in samples]
    for key, value in zip(keys, raw, strict=True):
        peers[key].append(value)
    means = {key: sum(values) / len(values) for key, values in peers.items()}
    return raw, [value - means[key] for key, value in zip(keys, raw, strict=True)]


def agent_of(sample: Sample, role: str, prompt: Any) -> Sample:
    """A new agent of the execution that `sample` began."""
    agent = sibling_of(sample, prompt)
    agent.metadata[ROLE] = role
    return agent


def final_answer(sample: Sample) -> str:
    """What an agent says after its thinking."""
    return sample.response.removesuffix("<|im_end|>").rpartition("</think>")[2].strip()
