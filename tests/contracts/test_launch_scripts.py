"""The launches users know still parse: documented MODEL_ARGS and the usual recipe, on CPU."""

import argparse
import enum
import importlib
import shlex
import subprocess
from pathlib import Path

import pytest
from support.config_argv import base_argv
from support.published_configs import MODEL_SCRIPTS as PUBLISHED

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.cli.parse import load_config, parse
from slime.config.foreign import megatron_values
from slime.config.index import command_line_index

ROOT = Path(__file__).parents[2]
MODEL_SCRIPTS = sorted((ROOT / "scripts" / "models").glob("*.sh"))

RECIPE = """
--input-key prompt --label-key label --apply-chat-template --rollout-shuffle --rm-type deepscaler
--num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
--rollout-max-response-len 8192 --rollout-temperature 1 --global-batch-size 256 --balance-data
--eval-interval 20 --eval-prompt-data aime EVAL --n-samples-per-eval-prompt 16
--eval-max-response-len 16384 --eval-top-p 1
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1
--use-dynamic-batch-size --max-tokens-per-gpu 9216
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1
--expert-model-parallel-size 1 --expert-tensor-parallel-size 1
--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl
--entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28
--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9
--adam-beta2 0.98
--rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7
--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
--attention-softmax-in-fp32 --attention-backend flash
"""


def model_args(script: Path) -> list[str]:
    """MODEL_ARGS as bash gives them."""
    program = f'source {shlex.quote(str(script))}; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.splitlines()


def test_the_usual_recipe_is_accepted(tmp_path: Path) -> None:
    argv = base_argv(tmp_path)
    recipe = RECIPE.replace("EVAL", str(tmp_path / "prompts.jsonl")).split()
    config = load_config([*argv, *recipe])
    assert (config.global_batch_size, config.eps_clip_high, config.lr) == (256, 0.28, 1e-6)
    assert config.sglang_argv == {"mem_fraction_static": 0.7}
    assert "--attention-backend" not in config.megatron_argv


@pytest.mark.parametrize("script", MODEL_SCRIPTS, ids=lambda path: path.stem)
def test_model_args_are_accepted(script: Path) -> None:
    assert "--num-attention-heads" in parse(model_args(script)).megatron_argv


def test_every_script_has_the_flags_of_its_published_config() -> None:
    assert [script.stem for script in MODEL_SCRIPTS] == sorted(PUBLISHED)
    for script in MODEL_SCRIPTS:
        assert model_args(script) == megatron_flags_from_hf(PUBLISHED[script.stem]), script.stem


@pytest.mark.parametrize(
    ("name", "variable", "value", "expected"),
    [
        ("qwen3-4B", "MODEL_ARGS_ROTARY_BASE", "5000000", ["--rotary-base 5000000"]),
        ("qwen3-30B-A3B", "MODEL_ARGS_ROTARY_BASE", "10", ["--rotary-base 10"]),
        (
            "deepseek-v3",
            "MODEL_ARGS_NUM_LAYERS",
            "5",
            ["--num-layers 5", "--moe-layer-freq [0]*3+[1]*2"],
        ),
    ],
)
def test_what_a_variable_replaces(
    name: str, variable: str, value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    words = " ".join(model_args(ROOT / "scripts" / "models" / f"{name}.sh"))
    for flag in expected:
        assert f"{flag} " in words


@pytest.mark.filterwarnings("ignore")
def test_megatrons_parser_reads_what_the_recorded_table_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    # Stock Megatron cannot be imported on a CPU before slime has prepared the way.
    importlib.import_module("slime.backends.megatron")
    from megatron.training.arguments import add_megatron_arguments

    recipe = RECIPE.replace("EVAL", str(tmp_path / "prompts.jsonl")).split()
    words = load_config([*base_argv(tmp_path), *recipe]).megatron_argv
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    theirs, ours = vars(parser.parse_args(list(words))), megatron_values(words)
    plain = (str, int, float, bool, type(None), list)
    different = {
        name: (value, ours[name])
        for name, value in theirs.items()
        if isinstance(value, plain) and not isinstance(value, enum.Enum) and ours[name] != value
    }
    assert different == {}


def test_every_flag_of_the_quickstart_is_known() -> None:
    text = (ROOT / "examples" / "quickstart" / "run.sh").read_text()
    arrays = text[text.index("MODEL_ARGS=(") : text.index('echo "== stage 1')]
    flags = [word for word in arrays.split() if word.startswith("--")]
    assert [flag for flag in flags if flag not in command_line_index()] == []
