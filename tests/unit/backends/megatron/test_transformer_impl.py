"""--transformer-impl where TransformerEngine cannot be used, and torch's Adam where it could."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.megatron_runs import make_tiny_qwen3, trainer_config

from slime.backends.megatron.process.arguments import parse_megatron_args
from slime.errors import ConfigError

TE = ("--transformer-impl", "transformer_engine")


def parsed(folder: Path, device: str, *words: str) -> Any:
    config = trainer_config(make_tiny_qwen3(folder, vocab_size=106), *words)
    return parse_megatron_args(config, device=torch.device(device), rank=0, world_size=1)


def test_our_layers_are_the_default(tmp_path: Path) -> None:
    assert parsed(tmp_path, "cpu").transformer_impl == "local"


def test_without_a_card_our_layers_are_used_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert parsed(tmp_path, "cpu", *TE).transformer_impl == "local"
    assert "there is no GPU: slime's own layers are used" in caplog.text


def test_another_implementation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inference_optimized"):
        parsed(tmp_path, "cpu", "--transformer-impl", "inference_optimized")


def test_megatron_takes_torchs_adam_whatever_is_installed() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE


def test_a_broken_transformer_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.backends.megatron.process import stock

    def fail(name: str) -> None:
        raise RuntimeError("no compiled part")

    monkeypatch.setattr(stock.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"cannot be imported \(no compiled part.*uninstall it"):
        stock._import_transformer_engine()


def test_the_import_hides_optimizers_for_its_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.backends.megatron.process.stock import _torchs_adam

    monkeypatch.setitem(sys.modules, "amp_C", sys)
    with _torchs_adam():
        with pytest.raises(ImportError):
            import amp_C  # noqa: F401  # pyright: ignore[reportMissingImports]
        with pytest.raises(ImportError):
            import apex.optimizers  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert sys.modules["amp_C"] is sys
    assert "apex.optimizers" not in sys.modules
