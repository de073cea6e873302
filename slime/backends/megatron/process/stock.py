"""The import of stock Megatron: CPU answers first, and no warnings of what we do without."""

import contextlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from slime.backends.megatron.process import cpu, gradient_accumulation
from slime.errors import ConfigError

logger = logging.getLogger(__name__)

# What the backend will use, imported while other processes still start.
_MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.training.arguments",
    "torch._dynamo",  # torch's optimizers import it when the first one is built: a second
)

# Modules whose import makes Megatron use another optimizer than torch's.
_OTHER_OPTIMIZERS = (
    "transformer_engine.pytorch.optimizers",
    "apex.optimizers",
    "apex.multi_tensor_apply",
    "amp_C",
)


def load_megatron() -> None:
    """Import Megatron, without CUDA too; the second call costs nothing.

    Its warnings speak of missing TransformerEngine and Apex (we use neither) and of GPTModel's
    deprecation in favour of HybridModel (the version is pinned), so they are dropped; its errors
    are not.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # torch's checkpoint writer logs two lines per tensor, past the level of the root logger.
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.ERROR)
    with without_warnings(), _torchs_adam():
        gradient_accumulation.provide()
        cpu.install()
        for name in _MODULES:
            importlib.import_module(name)


def _import_transformer_engine() -> None:
    """Before Megatron does, whose message would be about something else.

    Raises:
        ConfigError: the package is there and broken, as one without its compiled part.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:  # Megatron does without it then
        logger.warning("transformer_engine is installed but cannot be imported: %s", error)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"transformer_engine is installed but cannot be imported ({error}), and Megatron would "
            "stop at that: repair it or uninstall it; slime does not need it."
        ) from error


@contextlib.contextmanager
def _torchs_adam() -> Iterator[None]:
    """In the block Megatron finds no optimizer of TransformerEngine or Apex, installed or not.

    It would take theirs, whose state has another form: a checkpoint then depended on what else is
    installed, and so would the bits of a step.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        _import_transformer_engine()  # which imports its optimizers itself
    modules: dict[str, Any] = sys.modules
    before = {name: modules[name] for name in _OTHER_OPTIMIZERS if name in modules}
    modules |= dict.fromkeys(_OTHER_OPTIMIZERS)  # None: their import fails
    try:
        yield
    finally:
        for name in _OTHER_OPTIMIZERS:
            del modules[name]
        modules |= before


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Around calls of Megatron that warn of deprecations inside Megatron itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
