"""examples/search-r1: its functions on a real engine and a real search server, and its settings."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import yaml
from support.live_rollout import LiveRollout, live_rollout, write_prompts
from support.scripted_model import save_scripted_model
from transformers import AutoTokenizer

from slime.data.sample import Sample

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "search-r1"
sys.path.insert(0, str(EXAMPLE))

import factbook  # noqa: E402
import search_r1  # noqa: E402

# The query's words are tokens of their own; a guess, a search, and information that the model makes up.
SCRIPT = {
    "\n": ["<search>", "<answer>", "<information>5801"],
    "<search>": ["td coast", "tx coast"],
    "td coast": ["</search>"],
    "tx coast": ["</search>"],
    "<information>5801": ["</information>"],
    "</information>": ["<answer>"],
    "<answer>": ["5801", "1234"],
    "5801": ["</answer>"],
    "1234": ["</answer>"],
}
CORPUS = [
    factbook.Passage("td coast", "td coast", "", "5801"),
    factbook.Passage("ao peak", "ao peak", "", "2620"),
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Generator[LiveRollout]:
    model = save_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPT)
    with live_rollout(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("search")
    factbook.write_corpus(folder / "corpus.jsonl", CORPUS)
    script = str(EXAMPLE / "search_server.py")
    process = subprocess.Popen(
        [sys.executable, script, "--port", "0", "--corpus", "corpus.jsonl", "--url-file", "url"],
        cwd=folder,
    )
    try:
        deadline = time.monotonic() + 60
        while not ((folder / "url").exists() and (folder / "url").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield (folder / "url").read_text()
    finally:
        process.terminate()
        process.wait(10)


def test_what_is_found_comes_back_untrained_and_the_answer_earns(
    scripted: LiveRollout, url: str, tmp_path: Path
) -> None:
    settings = tmp_path / "search.yaml"
    told = yaml.safe_load((EXAMPLE / "search-tiny.yaml").read_text())
    settings.write_text(json.dumps(told | {"search_url": url, "search_max_turns": 3}))
    prompts = write_prompts(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": [{"role": "user", "content": f"{n}: td coast?"}], "label": "5801"}
            for n in range(8)
        ],
    )
    run = scripted.run(
        prompts,
        f"--custom-config-path {settings} --custom-generate-function-path search_r1.generate "
        "--custom-rm-path search_r1.reward --rollout-max-response-len 200 "
        "--n-samples-per-prompt 16 --global-batch-size 32 --max-tokens-per-gpu 4096",
    )
    samples: list[Sample] = run.generate().samples
    tokenizer = AutoTokenizer.from_pretrained(scripted.model)
    seen: set[tuple[str, float]] = set()
    for sample in samples:
        assert sample.status is Sample.Status.COMPLETED
        ids = sample.tokens[sample.prompt_length :]
        mask = sample.loss_mask or [1] * len(ids)  # none where nothing was told
        untrained = tokenizer.decode([i for i, trains in zip(ids, mask, strict=True) if not trains])
        found = re.findall("<search>t([dx]) coast</search>", sample.response)
        # The other code is not there, but a coast is.
        assert untrained == "<information>5801</information>" * len(found)
        said = "".join(sample.metadata[search_r1.WORDS])
        is_honest = "<information>" not in said
        is_right = "<answer>5801</answer><|im_end|>" in sample.response
        assert sample.reward == float(is_honest and is_right)
        seen.add(("search" if found else "honest" if is_honest else "made up", sample.reward))
    assert seen >= {("search", 1.0), ("search", 0.0), ("made up", 0.0)}


def test_the_settings_of_both_variants_have_the_same_names() -> None:
    tiny, large = (
        yaml.safe_load((EXAMPLE / f"search-{name}.yaml").read_text()) for name in ("tiny", "qwen3")
    )
    assert tiny.keys() | {"search_url"} == large.keys()  # run.sh adds the address of its server
