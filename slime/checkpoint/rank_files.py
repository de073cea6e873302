"""Megatron's checkpoint format `torch`, read without Megatron: a file of `torch.save` for each rank.

An iteration is a folder of `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`: the tensor-parallel rank, then
the pipeline and the expert rank where there are several. A file has the tensors as the rank held them,
under `model`, or `model0`, `model1`, ... with virtual pipeline stages, and Megatron's arguments.

Files are pickled. None of what they name is imported or called: torch's restricted reader takes
tensors and plain values, and what else such files hold becomes a `_StandIn`.

Source: Megatron-Core 0.19.2, megatron/training/checkpointing.py, `get_checkpoint_name` and
`save_checkpoint`.
"""

import argparse
import contextlib
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from slime.config.checkpoints import RANK_FOLDER
from slime.errors import CheckpointError

FILE_NAME = "model_optim_rng.pt"
# What files of training hold besides tensors and plain values: Megatron's enums and settings in the
# arguments, and random states.
_STOOD_IN = re.compile(
    r"megatron\.(core|training)(\.\w+)+|numpy(\.\w+)*\.(_reconstruct|ndarray|dtype|scalar|\w+DType)"
    r"|signal\.Signals|_io\.BytesIO|pathlib\.(_local\.)?\w*Path|types\.SimpleNamespace"
)
# Fields of the arguments that change what the numbers mean, and the value that is understood.
_UNDERSTOOD: dict[str, Any] = {
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,  # its name before
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "use_legacy_models": False,
}
_OLDEST_VERSION = 2.0
# Pages of a mapped file count as memory of this process once they are read.
_MAX_MAPPED_BYTES = 2**30
_MAX_OPEN_FILES = 256

Chunk = dict[str, Tensor]


@dataclass(frozen=True)
class RankLayout:
    """Parallel sizes: tensor, pipeline, virtual pipeline stages of each, expert, expert tensor."""

    tp_size: int
    pp_size: int
    vpp_size: int
    ep_size: int
    etp_size: int

    @classmethod
    def from_args(cls, args: argparse.Namespace, where: Path) -> Self:
        """The layout that Megatron's arguments state.

        Raises:
            CheckpointError: they lack one, or state one that files of this format cannot hold.
        """
        sizes = vars(args)
        try:
            tp_size = int(sizes["tensor_model_parallel_size"])
            layout = cls(
                tp_size=tp_size,
                pp_size=int(sizes["pipeline_model_parallel_size"]),
                vpp_size=int(sizes.get("virtual_pipeline_model_parallel_size") or 1),
                ep_size=int(sizes.get("expert_model_parallel_size") or 1),
                etp_size=int(sizes.get("expert_tensor_parallel_size") or tp_size),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: its args do not state the parallel layout ({error!r}); was it written by "
                "Megatron?"
            ) from None
        if layout.tp_size % layout.etp_size:
            raise CheckpointError(
                f"{where} was written with --tensor-model-parallel-size {layout.tp_size} and "
                f"--expert-tensor-parallel-size {layout.etp_size}: the names of files say the rank of "
                "the first only, which must be a multiple of the second. Save it as torch_dist."
            )
        return layout

    def stage_ranks(self) -> set[tuple[int, int]]:
        """(tensor, expert) rank of the files that hold all weights of one pipeline stage."""
        return self._ranks(max(self.tp_size, self.etp_size * self.ep_size))

    def possible_ranks(self) -> set[tuple[int, int]]:
        """(tensor, expert) rank of all files there may be of one stage; the others are copies."""
        return self._ranks(math.lcm(self.tp_size, self.etp_size * self.ep_size))

    def _ranks(self, count: int) -> set[tuple[int, int]]:
        # Both groups count the same processes: the experts' ranks go on where the others begin anew.
        return {(r % self.tp_size, r // self.etp_size % self.ep_size) for r in range(count)}

    def folder_name(self, tp_rank: int, pp_rank: int, ep_rank: int) -> str:
        """As Megatron names the folder of a rank."""
        pipeline = f"_{pp_rank:03d}" if self.pp_size > 1 else ""
        expert = f"_{ep_rank:03d}" if self.ep_size > 1 else ""
        return f"mp_rank_{tp_rank:02d}{pipeline}{expert}"


class RankFiles:
    """One iteration of a checkpoint, read-only; tensors come from mapped files.

    Attributes:
        args: Megatron's arguments, as the first file has them.

    Raises:
        CheckpointError: a file is missing, left over, damaged, or of another run than the first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: OrderedDict[str, list[Chunk]] = OrderedDict()
        self._num_bytes = 0
        self._first: tuple[Any, ...] | None = None
        names = (item.name for item in path.iterdir())
        found = sorted(name for name in names if RANK_FOLDER.fullmatch(name))
        content = _load(path / found[0] / FILE_NAME)
        self.args = _args_of(content, path / found[0] / FILE_NAME)
        self.layout = RankLayout.from_args(self.args, path)
        self._check_folders(set(found))

    def _check_folders(self, found: set[str]) -> None:
        layout, stages = self.layout, range(self.layout.pp_size)
        needed = {layout.folder_name(t, p, e) for t, e in layout.stage_ranks() for p in stages}
        possible = {layout.folder_name(t, p, e) for t, e in layout.possible_ranks() for p in stages}
        absent = {name for name in needed & found if not (self.path / name / FILE_NAME).is_file()}
        problems = [
            f"{len(names)} {word}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
            for word, names in (
                ("missing", (needed - found) | absent),
                ("left over", found - possible),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"The files of {self.path} are not those of its layout, {_words(layout)}; "
                f"{'; '.join(problems)}. Is the copy complete, and of one run only?"
            )

    def files(self) -> list[Path]:
        """The files that hold all weights."""
        layout = self.layout
        names = {
            layout.folder_name(tp_rank, pp_rank, ep_rank)
            for tp_rank, ep_rank in layout.stage_ranks()
            for pp_rank in range(layout.pp_size)
        }
        return [self.path / name / FILE_NAME for name in sorted(names)]

    def file(self, tp_rank: int, pp_rank: int, ep_rank: int) -> Path:
        """The file of a rank."""
        return self.path / self.layout.folder_name(tp_rank, pp_rank, ep_rank) / FILE_NAME

    def chunk(self, tp_rank: int, pp_rank: int, ep_rank: int, vp_rank: int) -> Chunk:
        """Name -> tensor, a view of the file, of one virtual stage of a rank."""
        path = self.file(tp_rank, pp_rank, ep_rank)
        key = path.parent.name
        if key not in self._open:
            self._open[key] = self._chunks(path)
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key][vp_rank]

    def count(self, num_bytes: int) -> None:
        """Note that so much was read; after much, let the files go, and their pages with them."""
        self._num_bytes += num_bytes
        if self._num_bytes > _MAX_MAPPED_BYTES:
            self._open.clear()
            self._num_bytes = 0

    def _chunks(self, path: Path) -> list[Chunk]:
        content = _load(path)
        args = _args_of(content, path)
        facts = (*astuple(RankLayout.from_args(args, path)), content.get("iteration"))
        self._first = self._first or facts
        if facts != self._first:
            raise CheckpointError(
                f"{path} is of another layout or iteration than {self.path}'s other files; are they "
                "of two runs?"
            )
        size = self.layout.vpp_size
        keys = ["model"] if size == 1 else [f"model{i}" for i in range(size)]
        found = sorted(key for key in content if re.fullmatch(r"model\d*", key))
        if found != sorted(keys):
            raise CheckpointError(
                f"{path} holds {', '.join(found) or 'no model'}, but its args say {size} virtual "
                f"pipeline stages, {keys[0]} to {keys[-1]}; is it damaged?"
            )
        return [_tensors_of(content[key], path) for key in keys]


def _words(layout: RankLayout) -> str:
    return (
        f"TP {layout.tp_size}, PP {layout.pp_size}, VPP {layout.vpp_size}, EP {layout.ep_size}, "
        f"ETP {layout.etp_size}"
    )


def _args_of(content: dict[str, Any], path: Path) -> argparse.Namespace:
    """Megatron's arguments in a file, none of which says that numbers mean something else."""
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(
            f"{path} holds no args, which say how the model is cut; was it written by Megatron?"
        )
    for name, value in _UNDERSTOOD.items():
        if (found := getattr(args, name, value)) != value:
            raise CheckpointError(
                f"{path} was written with {name}={found!r}; only {value!r} is understood."
            )
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, float | int) or version < _OLDEST_VERSION:
        raise CheckpointError(
            f"{path} is of checkpoint version {version!r}, whose queries, keys and values are in "
            f"another order; {_OLDEST_VERSION} and later are understood. Load and save it with Megatron."
        )
    return args


def _tensors_of(chunk: Any, path: Path) -> Chunk:
    """The tensors of a chunk; what TransformerEngine keeps of its scales is none."""
    if not isinstance(chunk, dict):
        raise CheckpointError(f"{path}: its model is a {type(chunk).__name__}; is it damaged?")
    items = cast("dict[str, Any]", chunk)
    found = {name: value for name, value in items.items() if not name.endswith("._extra_state")}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name} is no tensor but a {type(value).__name__}; models of Megatron-LM "
                "before Megatron-Core are not understood."
            )
    return found


class _StandIn:
    """Stands for an object that is not read: takes any words, keeps nothing and does nothing."""

    def __new__(cls, *words: Any) -> Self:
        del words
        return super().__new__(cls)

    def __init__(self, *words: Any) -> None:
        del words

    def __setstate__(self, state: Any) -> None:
        del state


def _load(path: Path) -> dict[str, Any]:
    """What a file holds, its tensors mapped.

    Raises:
        CheckpointError: it cannot be read, or names classes that are not known to be harmless.
    """
    with _readable(path):
        names = get_unsafe_globals_in_checkpoint(path)
    known: dict[str, Any] = {"argparse.Namespace": argparse.Namespace}
    known |= {name: _StandIn for name in names if _STOOD_IN.fullmatch(name)}
    if foreign := sorted(set(names) - set(known)):
        raise CheckpointError(
            f"{path} names {', '.join(foreign)}, which reading it would import and could run. "
            "Weights need none of it: save the checkpoint again without it, or as torch_dist."
        )
    with _readable(path), safe_globals([(value, name) for name, value in known.items()]):
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dict but a {type(content).__name__}.")
    return cast("dict[str, Any]", content)


@contextlib.contextmanager
def _readable(path: Path) -> Generator[None]:
    """torch's errors on reading a file become CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the file again") from error
