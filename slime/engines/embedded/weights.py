"""ParameterStore: a model's parameters under their checkpoint names, loaded and verified."""

import base64
import binascii
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slime.engines.checksum import checksum
from slime.errors import CheckpointError, ShapeMismatch, UnknownParameter

logger = logging.getLogger(__name__)

# Recomputed from the config, never loaded; some checkpoints carry them.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class ParameterStore:
    """Views of a model's parameters and buffers by the names a checkpoint of it uses.

    transformers 5 keeps experts stacked, while checkpoints name them one by one: the reverse of
    its own loading rules gives each such name, and what it returns are views of the stacked
    tensors. Stacked names work as well, and so does `lm_head.weight` of tied embeddings.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: Any) -> None:
        own: dict[str, Tensor] = model.state_dict()
        storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
        views = {
            name: view
            for name, view in _checkpoint_names(model, own).items()
            if view.untyped_storage().data_ptr() in storages
        }
        self._views = {**own, **views}
        self._required = _required_names(own, views)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that can be loaded."""
        return tuple(self._views)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise when a tensor of this name and shape cannot be loaded.

        Raises:
            UnknownParameter: the model has no such parameter.
            ShapeMismatch: it has, with another shape.
        """
        if name.endswith(_IGNORED_SUFFIX):
            return
        view = self._views.get(name)
        if view is None:
            raise UnknownParameter(
                f"the engine's model has no parameter {name!r}; it has {len(self._views)} names, "
                f"such as {next(iter(self._views))!r}: is this the checkpoint of another model?"
            )
        if tuple(view.shape) != shape:
            raise ShapeMismatch(
                f"{name!r} has shape {list(shape)}, in the engine's model {list(view.shape)}; is "
                "this the checkpoint of another model?"
            )

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Copy checked tensors into the model; per name the checksum of what the model now holds.

        The checksum is taken of the parameter after the copy, in the dtype that came: a bf16
        tensor in an fp32 model compares with what was sent.
        """
        sums: dict[str, int] = {}
        for name, tensor in tensors:
            view = self._views.get(name)
            if view is not None:
                view.copy_(tensor)
                sums[name] = checksum(view.to(tensor.dtype))
        return sums

    def load_files(self, folder: str) -> dict[str, int]:
        """Load every safetensors file of a folder, which must hold the whole model.

        All names and shapes are checked before the first copy.

        Raises:
            CheckpointError: no such files, an unknown or missing name, a wrong shape.
        """
        from safetensors import SafetensorError

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no .safetensors file")
        with ExitStack() as stack:
            try:
                named = _open_all(stack, files)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{folder} has a file that cannot be read: {error}"
                ) from error
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in named}
            for name, shape in shapes.items():
                self.check(name, shape)
            self._check_complete(shapes, folder)
            return self.load((name, file.get_tensor(name)) for name, file in named)

    def load_parts(self, parts: Iterable[str]) -> dict[str, int]:
        """Load tensors given as base64 texts of safetensors files' bytes; all checked first.

        Raises:
            CheckpointError: bytes that are no safetensors file, an unknown name, a wrong shape.
        """
        tensors = [pair for part in parts for pair in _decoded(part)]
        for name, tensor in tensors:
            self.check(name, tuple(tensor.shape))
        return self.load(tensors)

    def _check_complete(self, found: Mapping[str, Any], folder: str) -> None:
        missing = [names for names in self._required if not any(name in found for name in names)]
        if missing:
            shown = ", ".join(sorted(names)[0] for names in missing[:5])
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the model's parameters, first {shown}; was it "
                "written completely?"
            )


def _open_all(stack: ExitStack, files: Iterable[Path]) -> list[tuple[str, Any]]:
    """(tensor name, its open file) for every tensor of some files."""
    from safetensors import safe_open

    opened: list[Any] = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return [(name, file) for file in opened for name in list(file.keys())]


def _checkpoint_names(model: Any, own: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers import core_model_loading

    rules: Any = core_model_loading
    return rules.revert_weight_conversion(model, dict(own))


def _required_names(own: dict[str, Tensor], views: dict[str, Tensor]) -> list[set[str]]:
    """Per stretch of memory the names that fill it: a folder must have one of each.

    Tied names share a stretch. A stacked parameter that checkpoints name in pieces counts by its
    pieces.
    """
    by_memory: dict[tuple[int, int], set[str]] = {}
    pieces = {name: view for name, view in views.items() if name not in own}
    split = {view.untyped_storage().data_ptr() for view in pieces.values()}
    whole = {n: t for n, t in own.items() if t.untyped_storage().data_ptr() not in split}
    for name, view in {**whole, **pieces}.items():
        by_memory.setdefault((view.data_ptr(), view.numel()), set()).add(name)
    return list(by_memory.values())


def _decoded(part: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        yield from load(base64.b64decode(part, validate=True)).items()
    except (binascii.Error, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"serialized_named_tensors holds something that is no safetensors file: {error}"
        ) from error
