"""scripts/run-*.sh: each passes `slime check` for the cluster it states, and harms nobody's processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import published_configs as published
from support.tiny_tokenizer import make_char_tokenizer

from slime.check.checker import Checked
from slime.cli.check import check_argv, split_args

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
LIBRARY = SCRIPTS / "lib" / "recipe.sh"


@dataclass(frozen=True)
class Recipe:
    """What a script states: the model's config.json, the machines, whether engines generate."""

    hf_config: dict[str, Any]
    nodes: int
    has_engines: bool = True


RECIPES = {
    "run-deepseek-r1.sh": Recipe(published.DEEPSEEK_R1, 16),
    "run-glm4-9B.sh": Recipe(published.GLM4_9B, 1),
    "run-glm4.5-106B-A12B.sh": Recipe(published.GLM45_AIR, 4),
    "run-glm4.5-355B-A32B.sh": Recipe(published.GLM45_355B, 8),
    "run-qwen3-30B-A3B.sh": Recipe(published.QWEN3_30B_A3B, 1),
    "run-qwen3-4B-base-sft.sh": Recipe(published.QWEN3_4B, 1, has_engines=False),
    "run-qwen3-4B.sh": Recipe(published.QWEN3_4B, 1),
}
RL = [name for name, recipe in RECIPES.items() if recipe.has_engines]
SFT = "run-qwen3-4B-base-sft.sh"
R1 = "run-deepseek-r1.sh"

_DAPO = {
    "prompt": [{"role": "user", "content": "What is 17 + 17? Put the answer into \\boxed{}."}],
    "label": "34",
}
_AIME = {
    "prompt": [{"role": "user", "content": "Find the number of triples. Use \\boxed{}."}],
    "label": "204",
}
_HERMES = {
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Say hi."},
        {"role": "assistant", "content": "Hi."},
    ]
}
_FILES = {"PROMPT_DATA": _DAPO, "EVAL_DATA": _AIME, "TRAIN_DATA": _HERMES}


@dataclass(frozen=True)
class World:
    """What a user has: data, model folders without weights, and something that notes commands."""

    folder: Path

    def run(
        self, name: str, *flags: str, **changes: str | None
    ) -> subprocess.CompletedProcess[str]:
        """The script with --dry-run, its Python replaced by one that prints its words."""
        inputs: dict[str, str | None] = {
            variable: str(self.folder / f"{variable}.jsonl") for variable in _FILES
        }
        inputs |= {
            "MODEL_DIR": str(self.folder / name),
            "SAVE_DIR": str(self.folder / "save"),
            "PYTHON": str(self.folder / "python"),
        }
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        environment |= {key: value for key, value in (inputs | changes).items() if value}
        return subprocess.run(
            ["bash", str(SCRIPTS / name), "--dry-run", *flags],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def words(self, name: str, *flags: str, **changes: str | None) -> list[str]:
        """The words after `slime check`."""
        done = self.run(name, *flags, **changes)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        return words[words.index("check") + 1 :]

    def check(self, name: str, *flags: str, **changes: str | None) -> Checked:
        return check_argv(split_args(self.words(name, *flags, **changes)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = make_char_tokenizer(folder / "tokenizer")
    for name, recipe in RECIPES.items():
        shutil.copytree(tokenizer, folder / name)
        (folder / name / "config.json").write_text(json.dumps(recipe.hf_config))
    for variable, row in _FILES.items():
        (folder / f"{variable}.jsonl").write_text(f"{json.dumps(row)}\n" * 256)
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    return World(folder)


# --- what the recipes ask for ---


@pytest.mark.parametrize("name", ["retool", "search-r1", "coding-agent"])
def test_the_recipe_with_a_tool_passes_the_check(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    example = ROOT / "examples" / name
    monkeypatch.syspath_prepend(str(example))  # as the script does for its own process
    script = os.path.relpath(example / "run-qwen3-4B.sh", SCRIPTS)
    words = world.words(script, MODEL_DIR=str(world.folder / "run-qwen3-4B.sh"))
    assert words[:4] == ["--nodes", "1", "--gpus-per-node", "8"]
    found = check_argv(split_args(words))
    assert found.problems == ()
    expected = ("on this machine", "--custom-config-path")  # the tool's settings are no flags
    assert all(expected[0] in note or expected[1] in note for note in found.notes), found.notes


def test_every_recipe_is_listed_here() -> None:
    assert sorted(path.name for path in SCRIPTS.glob("run-*.sh")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_check_for_the_cluster_it_states(world: World, name: str) -> None:
    words = world.words(name)
    assert words[:4] == ["--nodes", str(RECIPES[name].nodes), "--gpus-per-node", "8"]
    found = check_argv(split_args(words))
    assert found.problems == ()
    # The weights are not here, and this disk may be small; nothing else is to be said.
    assert all(note.startswith("on this machine") for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            R1,
            (
                "deepseek_v3, 61 layers, 671 B parameters",
                "cuda: 128 slots: 128 training ranks (16 x 8; tensor 8 x context 4 x pipeline 4; "
                "experts over 32) and 2 engines of 64 slots, sharing slots",
                "4 per round, 12,000 in all; 256 samples each over 1 data-parallel rank",
            ),
        ),
        (
            "run-glm4.5-355B-A32B.sh",
            ("(8 x 8; tensor 8 x context 2 x pipeline 4; experts", "2 engines of 32"),
        ),
        ("run-qwen3-30B-A3B.sh", ("(1 x 8; tensor 4 x data 2; experts over 8) and 1 engine of 8",)),
        ("run-glm4-9B.sh", ("tensor 2 x context 2 x data 2) and 4 engines of 2 slots",)),
    ],
)
def test_the_summary_of_a_recipe(world: World, name: str, parts: tuple[str, ...]) -> None:
    text = " ".join(world.check(name).summary.split())
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (R1, "--decoder-last-pipeline-num-layers 12", "into 3 equal stages"),
        (R1, "--context-parallel-size 3", "tensor x pipeline x context parallel size = 96 does"),
        (R1, "--expert-model-parallel-size 48", "--expert-model-parallel-size 48 does not divide"),
        (R1, "--expert-tensor-parallel-size 2", "2 x 32 x 4 = 256 does not divide"),
        (R1, "--num-steps-per-rollout 3", "--num-steps-per-rollout 3 does not divide"),
        (R1, "--sglang-ep-size 24", "--sglang-ep-size 24 does not divide --num-experts 256"),
        (R1, "--sglang-dp-size 6", "--sglang-dp-size 6 does not divide the 64 devices"),
        (R1, "--sglang-moe-dense-tp-size 2", "SGLang knows 1 and 64"),
        (R1, "--moe-ffn-hidden-size 2047", "--moe-ffn-hidden-size 2047 (config.json"),
        (R1, "--num-virtual-stages-per-pipeline-rank 3", "does not divide the 13 layers of a pi"),
        (R1, "--rollout-num-gpus-per-engine 12", "no multiple of --rollout-num-gpus-per-engine 12"),
        ("run-glm4-9B.sh", "--rollout-num-gpus-per-engine 3", "does not divide --num-attention-h"),
        ("run-qwen3-4B.sh", "--sglang-ep-size 2", "the model has no experts"),
        (SFT, "--input-key conversations", "no key 'conversations'"),
    ],
)
def test_a_change_that_cannot_work_is_named(
    world: World, name: str, flags: str, expected: str
) -> None:
    assert expected in "\n".join(world.check(name, *flags.split()).problems)


def test_machines_that_are_too_few_are_named(world: World) -> None:
    flags = ("--actor-num-nodes", "16")
    found = world.check(R1, *flags, NUM_NODES="8").problems
    assert found[0].startswith("the run needs 128 device slots (training 128, rollout 128, shared)")


def test_engines_that_would_lie_on_two_nodes_are_named(world: World) -> None:
    flags = "--no-colocate --actor-num-gpus-per-node 4 --rollout-num-gpus 8 --rollout-num-gpus-per-engine 8"
    words = world.words("run-qwen3-4B.sh", *flags.split(), NUM_NODES="2")
    argv = [word for word in words if word not in ("--colocate", "--no-colocate")]
    argv[argv.index("--actor-num-nodes") + 1] = "1"
    found = check_argv(split_args(argv)).problems
    assert len(found) == 1
    assert "the engine from slot 4 on would begin within one node of 8" in found[0]


# --- how a user meets them ---


def test_inputs_that_are_missing_are_told_at_once(world: World) -> None:
    done = world.run("run-qwen3-4B.sh", MODEL_DIR=None, EVAL_DATA=None)
    assert done.returncode == 2
    assert done.stdout == ""
    names = [line.split()[0] for line in done.stderr.splitlines()[1:]]
    assert names == ["MODEL_DIR", "EVAL_DATA"]


def test_paths_may_be_relative_and_hold_anything(world: World) -> None:
    words = world.words(SFT, "--run-dir", "a b*'\"$x", MODEL_DIR="my model", SAVE_DIR="out")
    assert words[words.index("--hf-checkpoint") + 1] == str(world.folder / "my model")
    assert words[-2:] == ["--run-dir", "a b*'\"$x"]
    assert words[words.index("--save") + 1] == str(world.folder / "out")


def test_what_a_job_gets_is_json_whatever_the_variables_hold() -> None:
    program = f"source {LIBRARY}; find_python; runtime_env"
    odd = "a \"b\" 'c' \\ $d\n"
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment |= {"ODD": odd, "JOB_ENV": "ODD"}
    command = ["bash", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout) == {"env_vars": {"PYTHONPATH": str(ROOT), "ODD": odd}}
    environment["JOB_ENV"] = "NO_SUCH"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "JOB_ENV names NO_SUCH" in done.stderr


def test_a_ray_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    program = f"source {LIBRARY}; find_python; start_ray() {{ say started; }}; find_ray"
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment["RAY_TMPDIR"] = str(tmp_path)
    command = ["bash", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert "left 127.0.0.1:1, where nothing answers" in done.stderr
    assert done.stderr.endswith("recipe: started\n")


def test_openhermes_as_published_becomes_data_of_the_sft_recipe(
    world: World, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]
    rows = [{"source": "x", "system_prompt": None, "conversations": turns}] * 200
    source, target = tmp_path / "openhermes2_5.json", tmp_path / "openhermes.parquet"
    source.write_text(json.dumps([*rows, {"conversations": turns[:1]}], indent=2))
    command = [sys.executable, str(SCRIPTS / "prepare_openhermes.py"), str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("200 of 201 conversations in ")
    assert "1 left out: not ending in an assistant turn" in done.stdout
    found = world.check(SFT, TRAIN_DATA=str(target))
    assert found.problems == ()
    assert f"200 prompts in {target} (200 rows checked; the longest" in " ".join(
        found.summary.split()
    )
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert again.returncode == 1
    assert "is there already" in again.stderr


# --- how they are written ---

SHELL = [*sorted(SCRIPTS.glob("run-*.sh")), LIBRARY]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_script_is_careful(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert "set -euo pipefail" in code
    # Nothing is ended by its name, and no cluster that is not ours.
    assert re.findall(r"\bp[k]ill\b|\bkill[a]ll\b", code) == []
    for word in ("ray stop", "kill -9", "rm -rf", "eval ", "set -x"):
        assert word not in code.replace("eval-", ""), word
    # Arrays and other variables of a command line stand in quotes.
    assert re.findall(r'(?<!")\$\{\w+\[[@*]\]\}', code) == []
    assert re.findall(r"\$\w+\[", code) == []
    absolute = re.findall(r"""(?:^|[\s"'=:])(/[A-Za-z][\w./-]*)""", code, re.MULTILINE)
    assert [found for found in absolute if not found.startswith("/dev/")] == []
    assert subprocess.run(["bash", "-n", str(path)], timeout=20).returncode == 0
    if path != LIBRARY:
        assert os.access(path, os.X_OK)


def test_what_is_killed_was_started_by_the_library() -> None:
    targets = re.findall(r"\bkill (.+?)(?: 2>|;|$)", LIBRARY.read_text(), re.MULTILINE)
    own = re.compile(r'-(?:0|TERM|KILL --) "-?\$RECIPE_(?:RAY|SUBMIT)_PID"')
    assert targets
    assert [target for target in targets if not own.fullmatch(target)] == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    files = [str(path) for path in SHELL]
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
