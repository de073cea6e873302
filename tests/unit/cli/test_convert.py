"""The conversion tools as they are typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_families import make_tiny_family

from slime.checkpoint.convert import megatron_flags_from_hf
from slime.checkpoint.hf import HfFolder, read_hf_config
from slime.checkpoint.torch_dist import TorchDistFolder
from slime.cli.convert import (
    parse_size,
    run_hf_to_fp8,
    run_hf_to_torch_dist,
    run_to_hf,
    run_torch_dist_to_hf,
)
from slime.errors import ConfigError

ROOT = Path(__file__).parents[3]
VOCAB = 106
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    return Path(make_tiny_family(folder, "qwen3", vocab_size=VOCAB))


def rows(saved: Path) -> int:
    return TorchDistFolder(saved / "release").shapes()[EMBEDDING][0]


def test_model_args_pad_the_vocabulary_as_megatron_does(model: Path, tmp_path: Path) -> None:
    words = megatron_flags_from_hf(read_hf_config(model))
    base = ["--hf-checkpoint", str(model), "--save"]
    assert run_hf_to_torch_dist([*base, str(tmp_path / "a"), *words]) == 0
    assert rows(tmp_path / "a") == 128
    multiple = ["--make-vocab-size-divisible-by", "10"]
    assert run_hf_to_torch_dist([*base, str(tmp_path / "b"), *words, *multiple]) == 0
    assert rows(tmp_path / "b") == 110
    assert run_hf_to_torch_dist([*base, str(tmp_path / "c"), "--padded-vocab-size", "120"]) == 0
    assert rows(tmp_path / "c") == 120
    assert run_hf_to_torch_dist([*base, str(tmp_path / "d")]) == 0
    assert rows(tmp_path / "d") == VOCAB


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "7"], "--num-layers: flags say 7, config.json 4"),
        (["--nun-layers", "4"], "--nun-layers"),
        (["--padded-vocab-size", "3"], "cannot hold the checkpoint's 106 tokens"),
    ],
)
def test_words_that_do_not_fit_are_named(
    words: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = megatron_flags_from_hf(read_hf_config(model)) if "layers" in words[0] else []
    argv = ["--hf-checkpoint", str(model), "--save", str(tmp_path / "out"), *given, *words]
    assert run_hf_to_torch_dist(argv) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "release").exists()


@pytest.mark.parametrize(
    "run", [run_hf_to_torch_dist, run_torch_dist_to_hf, run_to_hf, run_hf_to_fp8]
)
def test_missing_words_are_named(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(run)
    assert run([]) == 1
    assert "required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "size"),
    [("5GiB", 5 * 2**30), ("500MB", 500 * 10**6), ("1.5kb", 1500), ("12", 12), ("7B", 7)],
)
def test_sizes(words: str, size: int) -> None:
    assert parse_size(words) == size


@pytest.mark.parametrize("words", ["5 elephants", "GiB", "5TiB", ""])
def test_what_is_no_size_is_named(words: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(words)


def test_the_scripts_convert_there_and_back_under_torchrun(model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
    ]
    tool = [str(ROOT / "tools" / "convert_hf_to_torch_dist.py"), "--hf-checkpoint", str(model)]
    command = [*torchrun, *tool, "--save", str(tmp_path / "saved")]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)
    back = [
        *(*torchrun, str(ROOT / "tools" / "convert_to_hf.py")),
        *("--load", str(tmp_path / "saved"), "--output-dir", str(tmp_path / "back")),
        *("--origin-hf-dir", str(model), "--chunk-size", "100KB"),
    ]
    done = subprocess.run(
        back, env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stderr.count("back: written") == 1
    assert_equal_folders(tmp_path / "back", model)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert all(name.endswith((".safetensors", "config.json", "index.json")) for name in names)


def assert_equal_folders(path: Path, other: Path) -> None:
    with HfFolder(other) as expected, HfFolder(path) as found:
        assert set(found.names()) == set(expected.names())
        for name in expected.names():
            assert torch.equal(found.tensor(name), expected.tensor(name)), name


def test_the_format_is_seen_and_one_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hf_to_torch_dist(["--hf-checkpoint", str(model), "--save", str(tmp_path / "a")]) == 0
    argv = ["--input-dir", str(tmp_path / "a"), "--output-dir", str(tmp_path / "back")]
    argv += ["--origin-hf-dir", str(model)]
    assert run_to_hf([*argv, "--ckpt-format", "torch"]) == 1
    assert "is a checkpoint of --ckpt-format torch_dist, not torch" in capsys.readouterr().err
    assert run_to_hf([*argv, "--ckpt-format", "torch_dcp"]) == 1
    assert "invalid choice: 'torch_dcp'" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert run_to_hf(argv) == 0
    assert_equal_folders(tmp_path / "back", model)
    assert run_torch_dist_to_hf(argv) == 1
    assert "not empty" in capsys.readouterr().err
    assert run_torch_dist_to_hf([*argv, "--force"]) == 0


def test_fp8_by_its_words(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model-dir", str(model), "--save-dir", str(tmp_path / "fp8")]
    assert run_hf_to_fp8([*base, "--strategy", "channel"]) == 1
    assert "only block with 128 128 is built" in capsys.readouterr().err
    assert run_hf_to_fp8([*base, "--scale-fmt", "ue8m0"]) == 0
    name = "model.layers.0.mlp.up_proj.weight"
    with HfFolder(tmp_path / "fp8") as folder:
        assert folder.tensor(name).dtype == torch.bfloat16
    assert run_hf_to_fp8(base) == 1
    assert "not empty" in capsys.readouterr().err
