"""examples/coding-agent: the library's agent on a real engine behind the real endpoint, in the real sandbox."""

import random
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import save_scripted_model
from transformers import AutoTokenizer

from slime.data.sample import Sample

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "coding-agent"
sys.path[:0] = [str(EXAMPLE), str(ROOT / "examples" / "quickstart")]

import repairs  # noqa: E402

TASK = repairs.Repair("k", "max", "min", 6)


def action(command: str) -> str:
    return f"{repairs.OPEN}{command}\n{repairs.CLOSE}"


LOOK, ESCAPE = action("cat k.py"), action("python -c 'open(\"/etc/passwd\")'")
FIX, SUBMIT = action("sed -i s/max/min/ k.py && python t.py"), action(repairs.SUBMIT)
SCRIPT = {"\n": [LOOK, ESCAPE, FIX, SUBMIT]}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    model = save_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPT, context=2048)
    with live_rollout(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


def test_episodes_are_played_and_paid_and_train_on_what_the_model_wrote(
    scripted: LiveRollout, tmp_path: Path
) -> None:
    row = repairs.row(TASK, random.Random(0))
    prompts = write_prompts(tmp_path / "prompts.jsonl", [row] * 8)
    # The flags of live_rollout have the question come rendered; nobody looks at it here.
    run = scripted.run(
        prompts,
        f"--custom-config-path {EXAMPLE}/tiny.yaml --agent-function-path coder.run_coder "
        "--metadata-key metadata --rollout-max-response-len 1500 --n-samples-per-prompt 8 "
        "--global-batch-size 16 --max-tokens-per-gpu 4096",
    )
    result = run.generate()
    samples: list[Sample] = result.samples
    tokenizer: Any = AutoTokenizer.from_pretrained(scripted.model)
    assert len(samples) == 16  # an episode is one conversation: no branches
    told: set[str] = set()
    for sample in samples:
        text = "<|im_start|>assistant\n" + sample.response
        turns = re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text, re.S)
        ids = sample.tokens[sample.prompt_length :]
        mask = sample.loss_mask or [1] * len(ids)
        trained = tokenizer.decode([i for i, trains in zip(ids, mask, strict=True) if trains])
        assert trained == "".join(f"{turn}<|im_end|>" for turn in turns)
        told.update(re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", sample.response, re.S))
        is_submitted = sample.metadata["exit_status"] == "Submitted"
        assert is_submitted == (turns[-1] == SUBMIT)
        assert sample.metadata["steps"] == len(turns)
        assert sample.reward == float(is_submitted and FIX in turns)
    assert {sample.reward for sample in samples} == {0.0, 1.0}
    source = TASK.source("max").strip()
    assert told >= {source, "ok"}
    assert "Traceback (most recent call last):" in {text.partition("\n")[0] for text in told}
    assert result.metrics["rollout/usage/requests/mean"] > 1
