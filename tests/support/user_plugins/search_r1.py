"""Search as a tool, in several turns; text goes to the engine and comes back, in the manner of Search-R1."""

import asyncio
import re

from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

CONFIG = {"max_turns": 3, "search_concurrency": 8, "format_score": 0.2}
SEMAPHORE = asyncio.Semaphore(CONFIG["search_concurrency"])
FACTS = {"moon": "The moon is made of cheese."}


async def search(query):
    async with SEMAPHORE:
        await asyncio.sleep(0.01)
        return FACTS.get(query.strip(), "nothing found")


async def execute(prediction):
    """(what the environment says, whether it is over)"""
    match = re.search(r"<(search|answer)>(.*?)</\1>", prediction, re.DOTALL)
    if match is None:
        return "\nMy action is not valid. Let me try again.\n", False
    if match[1] == "answer":
        return "", True
    return f"\n\n<information>{await search(match[2])}</information>", False


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout, "partial rollout is not supported here"
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response, response_ids, loss_mask, log_probs = "", [], [], []
    output = None
    for _ in range(CONFIG["max_turns"]):
        payload = {
            "text": sample.prompt + response,
            "sampling_params": sampling_params,
            "return_logprob": True,
        }
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        new = output["meta_info"]["output_token_logprobs"]
        response += output["text"]
        response_ids += [item[1] for item in new]
        log_probs += [item[0] for item in new]
        loss_mask += [1] * len(new)
        if output["meta_info"]["finish_reason"]["type"] == "length":
            break
        said, done = await execute(output["text"])
        if done:
            break
        said_ids = state.tokenizer(said, add_special_tokens=False)["input_ids"]
        response += said
        response_ids += said_ids
        log_probs += [0.0] * len(said_ids)
        loss_mask += [0] * len(said_ids)

    sample.tokens = prompt_ids + response_ids
    sample.response_length = len(response_ids)
    sample.response = response
    sample.loss_mask = loss_mask
    sample.rollout_log_probs = log_probs
    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    return sample


async def reward_func(args, sample, **kwargs):
    answers = re.findall(r"<answer>(.*?)</answer>", sample.response)
    if not answers:
        return 0.0
    return 1.0 if answers[-1].strip() == sample.label else CONFIG["format_score"]


def keep_if_rewards_differ(args, samples, **kwargs):
    rewards = [sample.get_reward_value(args) for sample in samples]
    if len(set(rewards)) > 1:
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"all_{rewards[0]}", keep_when_insufficient=True)
