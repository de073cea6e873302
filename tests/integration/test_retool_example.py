"""examples/retool: its functions on a real engine and in the real sandbox, and its recipe."""

import json
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import save_scripted_model
from transformers import AutoTokenizer

from slime.data.sample import Sample

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "retool"
sys.path.insert(0, str(EXAMPLE))

import python_tool  # noqa: E402

PRODUCT = "<code>print(6*7)</code>"
ESCAPE = "<code>print(open('/etc/passwd').read())</code>"
SILENT = "<code>x = 1</code>"
# A program or a guess; what comes after a tool begins like what comes after the question.
SCRIPT = {"\n": [PRODUCT, ESCAPE, SILENT, "42", "7"]}
TOLD = {
    PRODUCT: "42",
    ESCAPE: "error: PermissionError: [Errno 1] Operation not permitted: '/etc/passwd'",
    SILENT: "(no output)",
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    model = save_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPT, context=2048)
    with live_rollout(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


def test_programs_run_and_what_they_say_comes_back_untrained(
    scripted: LiveRollout, tmp_path: Path
) -> None:
    settings = tmp_path / "tool.yaml"
    told = {"tool_max_turns": 3, "tool_timeout_s": 120, "tool_output_characters": 200}
    settings.write_text(json.dumps(told | {"tool_system_prompt": ""}))
    prompts = write_prompts(
        tmp_path / "prompts.jsonl",
        [{"prompt": [{"role": "user", "content": f"{n}: 6*7?"}], "label": "42"} for n in range(8)],
    )
    run = scripted.run(
        prompts,
        f"--custom-config-path {settings} --custom-generate-function-path python_tool.generate "
        "--custom-rm-path python_tool.exact_reward --rollout-max-response-len 1000 "
        "--n-samples-per-prompt 8 --global-batch-size 16 --max-tokens-per-gpu 4096",
    )
    samples: list[Sample] = run.generate().samples
    tokenizer = AutoTokenizer.from_pretrained(scripted.model)
    seen: set[str] = set()
    for sample in samples:
        turns = sample.response.split("<|im_start|>assistant\n")
        programs = re.findall(r"<code>.*?</code>", sample.response, re.DOTALL)
        seen.update(programs)
        outputs = re.findall(r"<\|im_start\|>tool\n(.*?)<\|im_end\|>", sample.response, re.DOTALL)
        assert outputs == [TOLD[program] for program in programs[: len(outputs)]]
        ids = sample.tokens[sample.prompt_length :]
        mask = sample.loss_mask or [1] * len(ids)  # none where no tool spoke
        untrained = [token for token, trains in zip(ids, mask, strict=True) if not trains]
        said = r"<\|im_end\|>(\n<\|im_start\|>tool\n.*?assistant\n)"
        expected = "".join(re.findall(said, sample.response, re.DOTALL))
        assert tokenizer.decode(untrained) == expected
        ended = sample.status is Sample.Status.COMPLETED
        assert sample.reward == float(ended and turns[-1] == "42<|im_end|>")
    assert seen == set(TOLD)
    assert {sample.reward for sample in samples} == {0.0, 1.0}


def test_the_system_prompt_goes_before_the_question() -> None:
    sample = Sample(prompt=[{"role": "user", "content": "6*7?"}], tokens=[1, 2])
    python_tool.add_system_prompt(sample, "Use Python.")
    assert isinstance(sample.prompt, list)
    assert [message["role"] for message in sample.prompt] == ["system", "user"]
    assert sample.tokens == []
    with pytest.raises(ValueError, match="leave --apply-chat-template out"):
        python_tool.add_system_prompt(Sample(prompt="text"), "Use Python.")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>a plan: ```python\n1\n```</think>so\n```python\nprint(1)\n```", "print(1)\n"),
        ("```py\na\n```\nand\n```python\nb\n```\n", "b\n"),
        ("<code>print(1)</code>", "print(1)"),
        ("```\nno language\n```", None),
        ("```python\nnot closed", None),
        ("<think>```python\n1\n```</think>\\boxed{1}", None),
    ],
)
def test_the_program_of_a_turn(text: str, program: str | None) -> None:
    assert python_tool.program_in(text) == program


@pytest.mark.parametrize(
    ("answer", "reward"),
    [(r"\boxed{1/2}", 1.0), (r"\boxed{\frac{1}{2}}", 1.0), (r"\boxed{2}", 0.0), ("0.5", 0.0)],
)
async def test_the_reward_looks_at_the_last_turn_alone(answer: str, reward: float) -> None:
    said = r"<|im_start|>tool\n\boxed{1/2}<|im_end|>"
    sample = Sample(response=said + answer, label="0.5", metadata={"answer": answer})
    sample.status = Sample.Status.COMPLETED
    args: Any = None
    assert await python_tool.reward(args, sample) == reward
    sample.status = Sample.Status.TRUNCATED
    assert await python_tool.reward(args, sample) == 0.0


def test_the_settings_of_both_variants_have_the_same_names() -> None:
    tiny, large = (yaml.safe_load((EXAMPLE / name).read_text()) for name in _SETTINGS)
    assert tiny.keys() == large.keys()
    assert "\\boxed{}" in large["tool_system_prompt"]


_SETTINGS = ("tool.yaml", "tool-qwen3.yaml")
