"""Whole rounds of one's own: samples one by one, groups in any order, an evaluation, and the old way to return."""

import asyncio

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.sglang_rollout import (
    GenerateState,
    eval_rollout,
    generate_and_rm,
    generate_and_rm_group,
)
from slime.utils.async_utils import run
from slime.utils.misc import load_function


async def one_round(args, rollout_id, data_source):
    state = GenerateState(args)
    groups = data_source.get_samples(args.rollout_batch_size)
    done = await asyncio.gather(
        *(
            generate_and_rm_group(args, group, state.sampling_params.copy(), evaluation=False)
            for group in groups
        )
    )
    return sorted(done, key=first_index)


def first_index(group):
    first = group[0][0] if isinstance(group[0], list) else group[0]
    return first.index


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    if evaluation:
        return evaluate(args, rollout_id, data_source, evaluation=True)
    return RolloutFnTrainOutput(
        samples=run(one_round(args, rollout_id, data_source)),
        metrics={"own/rounds": rollout_id + 1},
    )


def legacy_generate_rollout(args, rollout_id, data_buffer, evaluation=False):
    return run(one_round(args, rollout_id, data_buffer))


def evaluate(args, rollout_id, data_source, evaluation=False):
    assert evaluation

    async def answers():
        state = GenerateState(args)
        samples = [group[0] for group in data_source.get_samples(3)]
        params = {**state.sampling_params, "temperature": 0}
        return await asyncio.gather(
            *(generate_and_rm(args, sample, params, evaluation=True) for sample in samples)
        )

    samples = run(answers())
    return RolloutFnEvalOutput(
        data={
            "mine": {
                "rewards": [sample.get_reward_value(args) for sample in samples],
                "truncated": [sample.status == sample.Status.TRUNCATED for sample in samples],
                "samples": samples,
            }
        },
        metrics={"eval/own": 1.0},
    )


def evaluate_all(args, rollout_id, data_source, evaluation=False):
    output = run(eval_rollout(args, rollout_id))
    assert load_function("support.user_plugins.own_rollout.evaluate_all") is evaluate_all
    return output
