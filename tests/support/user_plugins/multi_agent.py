"""Two solvers answer at the same time, a third agent sees both: three samples of one execution."""

import asyncio
from copy import deepcopy

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def ask(args, sample, prompt, sampling_params):
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    agent = deepcopy(sample)
    agent.prompt = prompt
    agent.tokens = state.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if args.rollout_max_context_len is not None:
        room = args.rollout_max_context_len - len(agent.tokens)
        sampling_params = {
            **sampling_params,
            "max_new_tokens": min(room, sampling_params["max_new_tokens"]),
        }
    payload = {
        "input_ids": agent.tokens,
        "sampling_params": sampling_params,
        "return_logprob": True,
    }
    output = await post(url, payload)
    tokens = [item[1] for item in output["meta_info"]["output_token_logprobs"]]
    agent.rollout_log_probs = [item[0] for item in output["meta_info"]["output_token_logprobs"]]
    agent.tokens = agent.tokens + tokens
    agent.response = output["text"]
    agent.response_length = len(tokens)
    agent.loss_mask = [1] * len(tokens)
    finish = output["meta_info"]["finish_reason"]["type"]
    agent.status = Sample.Status.TRUNCATED if finish == "length" else Sample.Status.COMPLETED
    agent.rollout_id = sample.index
    return agent


async def generate_with_multi_agents(args, sample: Sample, sampling_params, evaluation=False):
    solvers = await asyncio.gather(
        *(ask(args, sample, sample.prompt, sampling_params) for _ in range(2))
    )
    told = sample.prompt + "".join(solver.response for solver in solvers) + "judge:\n"
    judge = await ask(args, sample, told, sampling_params)
    correct = sample.label in judge.response
    for agent in (*solvers, judge):
        agent.reward = 1.0 if correct else 0.0
    if evaluation:
        return judge
    return [*solvers, judge]
