"""`slime check` on the quickstart's own flags, each time with something broken: it names just that.

Every variant is judged in this process, and one in a process of its own, which is timed.
"""

import fcntl
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.quickstart_argv import QUICKSTART, ROOT, Quickstart, changed, make_quickstart

from slime.check.checker import Checked
from slime.cli.check import check_argv, run_check, split_args
from slime.cli.parse import load_config
from slime.errors import ConfigErrors

MAX_SECONDS = 2.0
ATTEMPTS = 3


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    return make_quickstart(tmp_path_factory.mktemp("quickstart"))


@dataclass(frozen=True)
class World:
    """A quickstart and a folder to break things in."""

    quickstart: Quickstart
    folder: Path

    def model(self, **files: str | None) -> str:
        """A copy of the model folder with files changed, or left out."""
        target = self.folder / "model"
        shutil.copytree(self.quickstart.path / "model", target)
        for name, text in files.items():
            path = target / name.replace("__", ".")
            path.unlink() if text is None else path.write_text(text)
        return str(target)

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def prompts(self, *rows: str) -> str:
        """The first rows of the training prompts, and more."""
        good = (self.quickstart.path / "data" / "train.jsonl").read_text().splitlines()[:4]
        return self.file("prompts.jsonl", "\n".join([*good, *rows]) + "\n")


@pytest.fixture
def world(quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.syspath_prepend(str(tmp_path))
    return World(quickstart, tmp_path)


def judge(argv: list[str], **options: Callable[[Path], int]) -> Checked:
    return check_argv(split_args(argv), **options)


# --- what is right ---


def test_both_stages_of_the_quickstart_can_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(
        sys.modules, "middle_letter", raising=False
    )  # another test's, in this process
    for argv in (world.quickstart.sft, world.quickstart.grpo):
        found = judge(list(argv))
        assert found.problems == ()
        assert found.notes == ()
    assert "middle_letter" not in sys.modules  # nothing of the user was run


def test_the_summary_says_what_the_run_will_do(world: World) -> None:
    text = " ".join(judge(list(world.quickstart.grpo)).summary.split())
    root = world.quickstart.path
    for part in (
        f"qwen3, 2 layers, 0.221 M parameters ({root}/sft/hf)",
        f"96 prompts in {root}/data/train.jsonl (96 rows checked; the longest of the first 96 has",
        f"begins at round 0 with {root}/sft/hf",
        "80, each 32 prompts x 8 samples = 256; 26.7 epochs of the data",
        "1 per round, 80 in all; 256 samples each over 1 data-parallel rank",
        "answers of at most 12: 3,072 per round, 0.246 M in all",
        "cpu: 3 slots",
        "1 training rank (1 x 1) and 2 engines",
        f"after the last round only, 1 in {root}/grpo/checkpoints, about 3.54 MB each",
        "every 20 rounds, at the end of each epoch (3 rounds) and at the end, 30 times in all: "
        "held_out (16 prompts x 1 sample)",
        "middle_letter.reward",
        f"{root}/grpo: metrics",
    ):
        assert part in text


# --- what is broken: (changes of flags, the one problem that is named) ---

Changes = dict[str, str | None]

FLAG_VARIANTS: list[tuple[Changes, str]] = [
    ({"no_such_thing": "1"}, r"unknown flag --no-such-thing"),
    ({"rollout_batch_size": None, "rollout_batchsize": "32"}, r"did you mean '--rollout-batch-s"),
    ({"num_attention_heads": None, "num_atention_heads": "3"}, r"mean '--num-attention-heads'"),
    ({"global_batch_size": "many"}, r"--global-batch-size takes a value of type int, found 'many'"),
    ({"advantage_estimator": "grop"}, r"--advantage-estimator: no choice 'grop'; did you mean 'gr"),
    ({"lr": "-1"}, r"--lr must be at least 0, found -1"),
    ({"freeze_indexer": ""}, r"--freeze-indexer: not built yet: DeepSeek sparse attention"),
    ({"context_parallel_size": "2"}, r"tensor x pipeline x context parallel size = 2 does not div"),
    ({"expert_model_parallel_size": "2"}, r"--expert-model-parallel-size 2: the model has no exp"),
    (
        {"num_virtual_stages_per_pipeline_rank": "2"},
        r"needs --pipeline-model-parallel-size above 1",
    ),
    ({"global_batch_size": "96"}, r"96 does not divide .* = 256; try 64 or 128"),
    (
        {"use_dynamic_batch_size": None, "max_tokens_per_gpu": None, "micro_batch_size": "3"},
        r"no multiple of data-parallel ranks x --micro-batch-size = 1 x 3 = 3; try 255",
    ),
    (
        {"global_batch_size": "4", "actor_num_gpus_per_node": "8"},
        r"--global-batch-size 4 is less than the 8 data-parallel ranks",
    ),
    ({"max_tokens_per_gpu": None}, r"--use-dynamic-batch-size needs --max-tokens-per-gpu"),
    ({"rollout_num_gpus": None}, r"--rollout-num-gpus is missing"),
    ({"rollout_num_gpus_per_engine": "3"}, r"2 is no multiple of --rollout-num-gpus-per-engine 3"),
    ({"custom_rm_path": None, "rm_type": "mth"}, r"--rm-type mth: no such reward; did you mean 'm"),
    ({"sglang_mem_fraction_static": "0.8"}, r"embedded CPU engine has no --sglang-mem-fraction-s"),
    ({"num_layers": "3"}, r"--num-layers 3 \(config\.json: num_hidden_layers 2\)"),
    ({"swiglu": None}, r"--swiglu: flags say False, config\.json True"),
    (
        {"prompt_data": "/nowhere/train.jsonl"},
        r"--prompt-data: there is no file /nowhere/train\.js",
    ),
    (
        {"eval_prompt_data": "held_out /nowhere.jsonl"},
        r"evaluation dataset held_out: there is no f",
    ),
    ({"hf_checkpoint": "/nowhere/model"}, r"--hf-checkpoint /nowhere/model: there is no config\.j"),
    ({"load": "/nowhere/checkpoints"}, r"--load /nowhere/checkpoints is no checkpoint"),
    ({"input_key": "question"}, r"train\.jsonl:1: no key 'question'; the row has \['label', 'prom"),
    ({"label_key": "answer"}, r"no key 'answer'.*and 95 more of the rows checked"),
    ({"custom_rm_path": "no_such_module.reward"}, r"there is no module 'no_such_module'"),
    ({"custom_rm_path": "slime.no_such.reward"}, r"there is no module 'slime\.no_such'"),
    (
        {"custom_rm_path": "middle_letter.rewards"},
        r"'middle_letter' has no 'rewards'; did you mean",
    ),
    ({"custom_rm_path": "reward"}, r"'reward' is no dotted path"),
    (
        {"custom_rm_path": "middle_letter.middle"},
        r"slime calls async fn\(args, sample\), found \(letters\): too many positional arguments",
    ),
    (
        {"custom_generate_function_path": "middle_letter.is_held_out"},
        r"--custom-generate-function-path middle_letter\.is_held_out: slime calls",
    ),
    ({"rollout_max_prompt_len": "3"}, r"no prompts left of 96 rows; all are longer than 3 tokens"),
    ({"sglang_context_length": "8"}, r"train\.jsonl:1: the prompt has \d+ tokens, more than .* 8"),
    ({"num_rollout": None, "num_epoch": "1", "rollout_batch_size": "100"}, r"at least --rollout-b"),
]


def name(variant: tuple[Changes, str]) -> str:
    return ",".join(f"{flag}={value}" for flag, value in variant[0].items())


@pytest.mark.parametrize("variant", FLAG_VARIANTS, ids=name)
def test_a_broken_flag_is_named(world: World, variant: tuple[Changes, str]) -> None:
    changes, expected = variant
    if "rollout_batch_size" in changes and changes["rollout_batch_size"] == "100":
        changes = changes | {"global_batch_size": "800"}
    found = judge(changed(world.quickstart.grpo, **changes))
    broken_sets = 2 if changes.keys() & {"input_key", "label_key", "sglang_context_length"} else 1
    assert len(found.problems) == broken_sets, found.problems  # training data, evaluation data
    assert re.search(expected, found.problems[0]), found.problems
    assert found.summary == ""


def one_problem(found: Checked) -> str:
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def test_a_malformed_row_is_named_by_its_line(world: World) -> None:
    path = world.prompts('{"prompt": "a?", "label": "a"', '{"prompt": "b?", "label": "b"}', "[1]")
    found = judge(changed(world.quickstart.grpo, prompt_data=path))
    assert [problem.split(" ")[0] for problem in found.problems] == [f"{path}:5:", f"{path}:7:"]
    assert "not JSON" in found.problems[0]
    assert "a row must be a JSON object" in found.problems[1]


def test_a_row_that_is_no_prompt_is_named(world: World) -> None:
    path = world.prompts('{"prompt": [{"content": "no role"}], "label": "a"}')
    problem = one_problem(judge(changed(world.quickstart.grpo, prompt_data=path)))
    assert problem.startswith(f"{path}:5: a message must look like")


def test_a_template_that_raises_is_named_with_its_row(world: World) -> None:
    model = world.model(chat_template__jinja="{{ raise_exception('no user turn') }}")
    found = judge(changed(world.quickstart.grpo, hf_checkpoint=model))
    assert len(found.problems) == 2  # training data, evaluation data
    assert (
        "train.jsonl:1: the chat template failed with TemplateError: no user" in found.problems[0]
    )


def test_a_template_that_is_none_is_named(world: World) -> None:
    model = world.model(chat_template__jinja="{% for m in messages %}")
    found = judge(changed(world.quickstart.grpo, hf_checkpoint=model))
    assert "TemplateSyntaxError" in found.problems[0]


def test_a_prompt_longer_than_the_context_is_named(world: World) -> None:
    row = {"prompt": [{"role": "user", "content": "a" * 300}], "label": "a"}
    path = world.prompts(json.dumps(row))
    problem = one_problem(judge(changed(world.quickstart.grpo, prompt_data=path)))
    assert problem.startswith(f"{path}:5: the prompt has 308 tokens, more than the engines'")
    assert "--rollout-max-prompt-len 255" in problem
    limited = changed(world.quickstart.grpo, prompt_data=path, rollout_max_prompt_len="255")
    found = judge(limited)
    assert found.problems == ()
    assert "1 of the first 5 prompts are longer than 255 tokens" in found.notes[0]


def test_a_missing_tokenizer_is_named(world: World) -> None:
    model = world.model(tokenizer__json=None)
    problem = one_problem(judge(changed(world.quickstart.grpo, hf_checkpoint=model)))
    assert "has no tokenizer (none of tokenizer.json" in problem


def test_missing_weights_are_named(world: World) -> None:
    model = world.model(model__safetensors=None)
    problem = one_problem(judge(changed(world.quickstart.grpo, hf_checkpoint=model)))
    assert "holds no weights" in problem


def test_a_syntax_error_in_a_users_module_is_named_by_its_line(world: World) -> None:
    path = world.file("broken_module.py", "import os\n\ndef reward(args, sample:\n    pass\n")
    argv = changed(world.quickstart.grpo, custom_rm_path="broken_module.reward")
    assert f"{path} line 3 is no Python" in one_problem(judge(argv))


def test_a_module_that_a_users_module_lacks_is_named(world: World) -> None:
    world.file("needs_more.py", "import nobody_has_this\nasync def reward(args, sample): ...\n")
    argv = changed(world.quickstart.grpo, custom_rm_path="needs_more.reward")
    assert "needs_more.py line 1 imports 'nobody_has_this'" in one_problem(judge(argv))


def test_a_folder_nobody_can_write_to_is_named(world: World) -> None:
    path = world.file("a_file", "")
    argv = changed(world.quickstart.grpo, run_dir=f"{path}/run")
    assert f"--run-dir {path}/run: this user cannot write in" in one_problem(judge(argv))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_named(world: World, taken_port: int) -> None:
    argv = changed(world.quickstart.grpo, sglang_router_port=str(taken_port))
    problem = one_problem(judge(argv))
    assert f"--sglang-router-port {taken_port}: another process listens on it" in problem
    # Where a router is to be adopted, somebody must listen.
    adopt = changed(argv, sglang_router_ip="127.0.0.1")  # pyright: ignore[reportArgumentType]
    assert judge(adopt).problems == ()


def test_a_router_that_nobody_started_is_named(world: World, taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    argv = changed(
        world.quickstart.grpo, sglang_router_ip="127.0.0.1", sglang_router_port=str(free)
    )
    assert "nobody answers there" in one_problem(judge(argv))


def test_an_engine_that_nobody_started_is_named(world: World, taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    argv = changed(
        world.quickstart.grpo,
        rollout_num_gpus=None,
        rollout_external_engine_addrs=f"127.0.0.1:{free}",
    )
    assert f"nobody answers at http://127.0.0.1:{free}" in one_problem(judge(argv))
    found = judge([word.replace(str(free), str(taken_port)) for word in argv])
    assert found.problems == ()
    assert "1 training rank (1 x 1) and 1 engine that somebody else runs" in " ".join(
        found.summary.split()
    )


def test_a_disk_that_is_too_small_is_named(world: World) -> None:
    # Every 40 rounds, and at the end of each epoch of 3: after rounds 3, 6, ... 78, 40 and 80.
    argv = changed(world.quickstart.grpo, save_interval="40")
    problem = one_problem(judge(argv, free_bytes=lambda folder: 10_000_000))
    assert (
        "28 checkpoint(s) of 3.54 MB and 1 Hugging Face folder(s) of 885 kB need 100 MB" in problem
    )
    assert judge(argv, free_bytes=lambda folder: 101_000_000).problems == ()
    only_last = changed(world.quickstart.grpo)
    assert judge(only_last, free_bytes=lambda folder: 10_000_000).problems == ()


def test_a_run_folder_in_use_is_named_and_left_alone(world: World) -> None:
    folder = world.folder / "run"
    folder.mkdir()
    lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT)
    text = f"process {os.getpid()} on {socket.gethostname()}\n"
    os.write(lock, text.encode())
    argv = changed(world.quickstart.grpo, run_dir=str(folder))
    assert judge(argv).problems == ()  # a file that nobody has locked is of a run that ended
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert f"--run-dir {folder} is in use by {text.strip()}" in one_problem(judge(argv))
    os.close(lock)
    assert (folder / "run.lock").read_text() == text
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_checkpoint_that_is_not_whole_is_named(world: World) -> None:
    folder = world.folder / "checkpoints"
    (folder / "iter_0000007").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    argv = changed(world.quickstart.grpo, load=str(folder), save=str(folder))
    assert "iter_0000007 is missing or not whole" in one_problem(judge(argv))
    (folder / "iter_0000007" / "mp_rank_00").mkdir()
    assert "convert_to_hf.py makes a Hugging Face folder" in one_problem(judge(argv))
    (folder / "iter_0000007" / "metadata.json").write_text("{}")
    assert "cannot continue the data after round 7" in one_problem(judge(argv))
    (folder / "rollout").mkdir()
    (folder / "rollout" / "global_dataset_state_dict_7.json").write_text("{}")
    found = judge(argv)
    assert found.problems == ()
    assert "resumes at round 8" in found.summary
    assert "72 (8 of 80 are done)" in found.summary


def test_the_first_start_of_a_run_that_resumes_itself_is_right(world: World) -> None:
    folder = str(world.folder / "new")
    assert judge(changed(world.quickstart.grpo, load=folder, save=folder)).problems == ()


def test_train_async_wants_devices_for_both_sides(world: World) -> None:
    script, *flags = changed(world.quickstart.grpo, colocate="")
    assert judge([script, *flags]).problems == ()
    assert "--colocate: train_async.py" in one_problem(judge(["train_async.py", *flags]))


def test_train_changes_no_weights_in_flight(world: World) -> None:
    script, *flags = changed(world.quickstart.grpo, update_weights_in_flight="")
    assert "run train_async.py" in one_problem(judge([script, *flags]))
    assert judge(["train_async.py", *flags]).problems == ()


def test_sft_wants_messages(world: World) -> None:
    path = world.file("texts.jsonl", '{"messages": "only a text"}\n' * 2000)
    problem = one_problem(judge(changed(world.quickstart.sft, prompt_data=path)))
    assert problem.startswith(f"{path}:1: SFT needs messages")


@pytest.mark.parametrize(
    ("own", "changes", "expected"),
    [
        ("--nodes 16 --gpus-per-node 8", {}, None),
        ("--gpus-per-node=2", {}, "needs 3 device slots (training 1, rollout 2), and 1 nodes x 2"),
        (
            "--nodes 4 --gpus-per-node 8",
            {"actor_num_gpus_per_node": "16"},
            "--actor-num-gpus-per-node 16 is more than the 8",
        ),
        ("--nodes 2", {"actor_num_nodes": "4"}, "--actor-num-nodes 4 is more than the 2 nodes"),
        (
            "--nodes 16",
            {"rollout_num_gpus_per_engine": "12", "rollout_num_gpus": "24"},
            "--rollout-num-gpus-per-engine 12 is neither",
        ),
        ("--nodes 1", {"device": "auto"}, None),
        # Slots on CPUs are processes, which no node keeps together.
        ("--nodes 2 --gpus-per-node 2", {"rollout_num_gpus_per_engine": "2"}, None),
    ],
)
def test_a_cluster_one_does_not_have(
    world: World, own: str, changes: Changes, expected: str | None
) -> None:
    argv = changed(world.quickstart.grpo, **changes)
    found = judge([*own.split(), "--", *argv])
    if expected is None:
        assert found.problems == ()
    else:
        assert expected in one_problem(found)


def test_engines_of_a_cluster_lie_within_its_nodes(world: World) -> None:
    argv = changed(world.quickstart.grpo, device="cuda", rollout_num_gpus_per_engine="2")
    found = judge(["--nodes", "2", "--gpus-per-node", "2", "--", *argv])
    torn = [text for text in found.problems if "would begin within one node of 2" in text]
    assert len(torn) == 1
    assert "the engine from slot 1 on" in torn[0]
    assert found.problems != judge(["--nodes", "2", "--gpus-per-node", "3", "--", *argv]).problems


def test_what_this_machine_lacks_is_a_note_for_another_cluster(world: World) -> None:
    argv = changed(world.quickstart.grpo, hf_checkpoint=world.model(model__safetensors=None))
    tight = {"free_bytes": lambda _: 1000}
    assert len(judge(argv, **tight).problems) == 2
    found = judge(["--nodes", "1", "--", *argv], **tight)
    assert found.problems == ()
    assert found.summary
    holds_none, is_small = found.notes
    assert "on this machine, which need not be one of them: " in holds_none
    assert "holds no weights" in holds_none
    assert "1 checkpoint(s) of 3.54 MB" in is_small


# --- all at once, and as a command ---


def test_every_problem_is_told_at_once(
    world: World, capsys: pytest.CaptureFixture[str], taken_port: int
) -> None:
    argv = changed(
        world.quickstart.grpo,
        no_such_flag="1",
        lr="fast",
        global_batch_size="96",
        num_layers="3",
        custom_rm_path="middle_letter.rewards",
        eval_prompt_data="held_out /nowhere.jsonl",
        input_key="question",
        sglang_router_port=str(taken_port),
    )
    assert run_check(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines[0].startswith("slime check: 8 problems")
    assert [line.split(".")[0].strip() for line in lines[1:]] == [str(n) for n in range(1, 9)]


def test_train_tells_all_flag_problems_at_once_too(world: World) -> None:
    argv = changed(
        world.quickstart.grpo, no_such_flag="1", lr="fast", rm_type="mth", num_layers="3"
    )
    with pytest.raises(ConfigErrors) as caught:
        load_config(argv[1:])
    assert len(caught.value.messages) == 4
    assert "4 problems:\n  1. unknown flag --no-such-flag" in str(caught.value)


@pytest.mark.parametrize("argv", [["--nodes", "x"], ["--gpus-per-node"]])
def test_its_own_options_want_numbers(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(argv) == 2
    assert "takes a number" in capsys.readouterr().err


_MEASURED = """
import sys, time
began = time.perf_counter()
from slime.cli.main import main
code = main(["check", *sys.argv[1:]])
heavy = {"torch", "ray", "transformers", "megatron", "sglang", "middle_letter"} & set(sys.modules)
sys.stderr.write(f"HEAVY {sorted(heavy)}")
sys.exit(code)
"""


def test_as_a_process_it_is_quick_and_imports_nothing_heavy(world: World) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{QUICKSTART}{os.pathsep}{ROOT}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode imports take twice as long
    command = [sys.executable, "-c", _MEASURED, *world.quickstart.grpo]
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(ATTEMPTS):
        began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, env=environment, cwd=world.folder, capture_output=True, text=True
        )
        wall.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("HEAVY []")
        if wall[-1] < MAX_SECONDS:
            break
    # Where other processes have the cores, the clock tells of them: then what it used counts.
    assert min(wall) < MAX_SECONDS or min(cpu) < MAX_SECONDS * 0.75, (wall, cpu)
