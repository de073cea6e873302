"""Tool calls with the token ids of the engine, kept aligned by `append_response_tokens`."""

import json
import re
import time

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

MAX_TURNS = 4


async def generate(args, sample: Sample, sampling_params, evaluation: bool = False) -> Sample:
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    if not sample.tokens:
        sample.tokens = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    headers = {"X-SMG-Routing-Key": sample.session_id} if sample.session_id else None
    for turn in range(MAX_TURNS):
        payload = {
            "input_ids": sample.tokens,
            "sampling_params": {**sampling_params, "max_new_tokens": 16},
            "return_logprob": True,
        }
        output = await post(url, payload, headers=headers)
        meta = output["meta_info"]
        sample.append_response_tokens(
            args,
            tokens=[item[1] for item in meta["output_token_logprobs"]],
            log_probs=[item[0] for item in meta["output_token_logprobs"]],
            trainable=True,
            meta_info=meta,
            text=output["text"],
        )
        sample.metadata["round_number"] = turn + 1
        calls = re.findall(r"<tool_call>(.*?)</tool_call>", output["text"])
        if sample.status != Sample.Status.COMPLETED or not calls:
            break
        started = time.time()
        said = "".join(
            f"<tool_response>{sum(json.loads(call)['args'])}</tool_response>" for call in calls
        )
        sample.non_generation_time += time.time() - started
        said_ids = state.tokenizer(said + "\n", add_special_tokens=False)["input_ids"]
        sample.append_response_tokens(
            args, tokens=said_ids, trainable=False, text=said + "\n", update_terminal_info=False
        )
    if evaluation:
        sample.metadata["was_evaluation"] = True
    return sample


def tag(args, sample, *, rollout_id=None, evaluation=False):
    sample.metadata["tagged_in"] = rollout_id


def remove_long(args, data):
    for group in data:
        for sample in group:
            if sample.response_length > 100:
                sample.remove_sample = True
