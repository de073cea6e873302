"""`slime model-args`: what it prints is what bash then passes."""

import json
import subprocess
from pathlib import Path

import pytest
from support.published_configs import MODEL_SCRIPTS

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.cli.main import main


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-9B", "qwen3-4B"])
def test_bash_reads_back_the_flags_of_the_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MODEL_SCRIPTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["model-args", str(tmp_path)]) == 0
    script = tmp_path / "args.sh"
    script.write_text(capsys.readouterr().out)
    # In a folder where the patterns of unquoted words would match files.
    (tmp_path / "0-3+1-58").touch()
    program = f'cd {tmp_path}; source {script}; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == megatron_flags_from_hf(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ('{"model_type": "mamba"}', "model_type 'mamba'"),
        ('{"model_type": "qwen3"}', "config"),
    ],
)
def test_a_folder_without_flags_says_why(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["model-args", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("slime model-args: ")
    assert message in captured.err


@pytest.mark.parametrize("words", [[], ["--help"], ["a", "b"]])
def test_other_words_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model-args", *words]) == 2
    assert capsys.readouterr().err.startswith("usage: slime model-args HF_DIR")
