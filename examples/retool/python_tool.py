"""Reasoning with Python: the model writes a program, the sandbox runs it, its output comes back, and so on.

What the tool says is not trained on (loss mask 0); the answer is what the last turn says.
"""

import asyncio
import re
from typing import Any

from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.rollout.turns import Turns
from slime.sandbox.shared import run_python
from slime.utils.types import Sample

ANSWER = "answer"
# The two ways to write a program: a block of Markdown, or what stands between tags.
_PROGRAM = re.compile(
    r"^```(?:python|py)[ \t]*\n(.*?)^```[ \t]*$|<code>(.*?)</code>", re.DOTALL | re.MULTILINE
)


async def generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """The sample with as many turns as it has programs, and one with the answer.

    Args:
        args: has `tool_max_turns`, `tool_timeout_s`, `tool_output_characters` and
            `tool_system_prompt` ("" for none) from --custom-config-path.
    """
    if args.tool_system_prompt and not sample.response_length:
        add_system_prompt(sample, args.tool_system_prompt)
    turns = Turns(
        args, sample, sampling_params, max_turns=args.tool_max_turns, evaluation=evaluation
    )
    while await turns.ask():
        code = program_in(turns.text)
        if code is None:
            sample.metadata[ANSWER] = turns.text
            break
        (output,) = await turns.call(run(args, code), timeout_s=args.tool_timeout_s)
        if not turns.tell_messages([{"role": "tool", "content": output}]):
            break
    return sample


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    r"""1.0 if the last turn ended by itself and its last \boxed{} equals the label, else 0.0.

    What a program printed is no answer: only the last turn is looked at.
    """
    if sample.status is not Sample.Status.COMPLETED or ANSWER not in sample.metadata:
        return 0.0
    answer = sample.metadata[ANSWER]
    # Formulas are compared in another process, and this waits for it.
    told = await asyncio.to_thread(compute_score, answer, str(sample.label), strict_box_verify=True)
    return float(told["acc"])


async def exact_reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the last turn ended by itself and is the label, character by character, else 0.0."""
    is_ended = sample.status is Sample.Status.COMPLETED
    return float(is_ended and sample.metadata.get(ANSWER) == sample.label)


async def run(args: Any, code: str) -> str:
    """What the model is told about its program: output, then the end of the error, if there is one."""
    result = await run_python(args, code)
    text = result.stdout.strip()
    if result.outcome != "ok":
        last_line = result.stderr.strip().rpartition("\n")[2]
        text = f"{text}\n{result.outcome}: {last_line}".strip()
    limit = args.tool_output_characters
    if len(text) > limit:
        text = f"{text[: limit // 2]}\n...\n{text[-(limit // 2) :]}"
    return text or "(no output)"


def program_in(text: str) -> str | None:
    """The program that a turn ends with; None if it gives an answer.

    The last one in the turn, after its thinking: a model plans with programs it does not want to run.
    """
    found = list(_PROGRAM.finditer(text.rpartition("</think>")[2]))
    return (found[-1][1] or found[-1][2] or "") if found else None


def add_system_prompt(sample: Sample, text: str) -> None:
    """Put a system message before the question, whose ids are made anew."""
    prompt = sample.prompt
    if isinstance(prompt, str):
        raise ValueError("the system prompt wants messages: leave --apply-chat-template out")
    sample.prompt = [{"role": "system", "content": text}, *prompt]
    sample.tokens = []
