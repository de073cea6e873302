"""The conversion tools' words: Hugging Face folders to Megatron checkpoints and back."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, get_args

from slime.checkpoint.convert import check_hf_against_flags
from slime.checkpoint.folders import (
    CkptFormat,
    Report,
    hf_to_fp8,
    hf_to_torch_dist,
    megatron_to_hf,
)
from slime.checkpoint.hf import read_hf_config
from slime.checkpoint.ranks import Ranks
from slime.config.foreign import megatron_index, megatron_values
from slime.config.words import read_words
from slime.errors import ConfigError, SlimeError

EXIT_FAILED = 1
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# A conversion's ranks wait for the slowest of them.
_RANKS_TIMEOUT = timedelta(hours=6)


def run_hf_to_torch_dist(argv: Sequence[str]) -> int:
    """`tools/convert_hf_to_torch_dist.py`: exit code."""
    parser = _Parser(
        "convert_hf_to_torch_dist.py",
        "A Hugging Face folder as a Megatron checkpoint, SAVE/release. Under torchrun the ranks share "
        "the layers. An interrupted conversion goes on where it was.",
    )
    parser.add_argument("--hf-checkpoint", required=True, help="the Hugging Face folder")
    parser.add_argument("--save", required=True, help="the checkpoint folder to write")
    parser.add_argument("--padded-vocab-size", type=int, help="rows of the embedding")
    parser.epilog = "MODEL_ARGS may be given too: they are then held against config.json."

    def run() -> None:
        options, words = parser.parse_known_args(list(argv))
        rows = options.padded_vocab_size
        if words:
            rows = _check_model_args(options.hf_checkpoint, words) if rows is None else rows
        with _Ranks() as ranks, _Bar(shows=ranks.rank == 0) as report:
            done = hf_to_torch_dist(
                options.hf_checkpoint,
                options.save,
                padded_vocab_size=rows,
                ranks=ranks,
                report=report,
            )
        if ranks.rank == 0:
            sys.stderr.write(f"{done}: written and read back\n")

    return _run(run)


def run_torch_dist_to_hf(argv: Sequence[str]) -> int:
    """`tools/convert_torch_dist_to_hf.py`: exit code."""
    parser = _Parser(
        "convert_torch_dist_to_hf.py",
        "The weights of a Megatron checkpoint, of any parallel layout, as a Hugging Face folder.",
    )
    parser.add_argument("--input-dir", required=True, help="the checkpoint, or one iteration of it")
    _add_hf_options(parser)
    return _run(lambda: _to_hf(parser.parse_args(list(argv)), "torch_dist"))


def run_to_hf(argv: Sequence[str]) -> int:
    """`tools/convert_to_hf.py`: exit code."""
    parser = _Parser(
        "convert_to_hf.py",
        "The weights of a Megatron checkpoint, of either format and any parallel layout, as a Hugging "
        "Face folder. Under torchrun the ranks share the layers.",
    )
    parser.add_argument(
        *("--input-dir", "--load"), required=True, help="the checkpoint, or one iteration of it"
    )
    parser.add_argument(
        "--ckpt-format",
        choices=get_args(CkptFormat),
        help="as Megatron's flag; seen from the folder unless given",
    )
    _add_hf_options(parser)

    def run() -> None:
        options = parser.parse_args(list(argv))
        _to_hf(options, options.ckpt_format)

    return _run(run)


def _add_hf_options(parser: argparse.ArgumentParser) -> None:
    """The flags of what writes a Hugging Face folder."""
    parser.add_argument("--output-dir", required=True, help="the folder to write")
    parser.add_argument("--origin-hf-dir", required=True, help="where config and tokenizer are")
    parser.add_argument("--model-name", help="accepted; config.json tells the architecture")
    parser.add_argument("--vocab-size", type=int, help="when it is not that of the config")
    parser.add_argument("--chunk-size", default="5GiB", help="largest file, 5GiB unless given")
    parser.add_argument("-f", "--force", action="store_true", help="replace what is there")
    parser.add_argument(
        "-a",
        "--add-missing-from-origin-hf",
        action="store_true",
        help="take what is not trained, as layers for multi-token prediction, from the origin",
    )


def _to_hf(options: argparse.Namespace, ckpt_format: CkptFormat | None) -> None:
    with _Ranks() as ranks, _Bar(shows=ranks.rank == 0) as report:
        megatron_to_hf(
            options.input_dir,
            options.output_dir,
            origin=options.origin_hf_dir,
            ckpt_format=ckpt_format,
            vocab_size=options.vocab_size,
            overwrite=options.force,
            adds_missing=options.add_missing_from_origin_hf,
            max_shard_bytes=parse_size(options.chunk_size),
            ranks=ranks,
            report=report,
        )
    if ranks.rank == 0:
        sys.stderr.write(f"{options.output_dir}: written\n")


def run_hf_to_fp8(argv: Sequence[str]) -> int:
    """`tools/convert_hf_to_fp8.py`: exit code."""
    parser = _Parser(
        "convert_hf_to_fp8.py",
        "A Hugging Face folder with its projections in blocks of 128 x 128 8-bit numbers (e4m3), a scale "
        "for each.",
    )
    parser.add_argument("--model-dir", required=True, help="the Hugging Face folder")
    parser.add_argument("--save-dir", required=True, help="the folder to write")
    parser.add_argument("--strategy", default="block", help="block; others are not built")
    parser.add_argument("--block-size", type=int, nargs=2, default=[128, 128], help="128 128")
    parser.add_argument("--max-workers", type=int, help="accepted; tensors pass one by one")
    parser.add_argument("--scale-fmt", choices=["ue8m0"], help="scales are powers of two")
    parser.add_argument("-f", "--force", action="store_true", help="replace what is there")

    def run() -> None:
        options = parser.parse_args(list(argv))
        if options.strategy != "block" or options.block_size != [128, 128]:
            raise ConfigError(
                f"--strategy {options.strategy} --block-size {options.block_size}: only block with "
                "128 128 is built; leave both out"
            )
        with _Bar(shows=True) as report:
            hf_to_fp8(
                options.model_dir,
                options.save_dir,
                power_of_two=options.scale_fmt == "ue8m0",
                overwrite=options.force,
                report=report,
            )
        sys.stderr.write(f"{options.save_dir}: written\n")

    return _run(run)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; --help lists the flags")


def _run(action: Callable[[], None]) -> int:
    """Run it; an error of ours is its message."""
    try:
        action()
    except SlimeError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return 0


def parse_size(words: str) -> int:
    """Bytes that `5GiB` or `500MB` stand for.

    Raises:
        ConfigError: it is no size.
    """
    number = words.rstrip("BKMGibkmg")
    unit = words[len(number) :].upper() or "B"
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"{words!r} is no size; write it like 5GiB or 500MB") from None
    return int(size)


def _check_model_args(folder: str, words: list[str]) -> int:
    """Rows of the embedding by MODEL_ARGS, which have to describe the model in `folder`.

    Raises:
        ConfigError: a flag that Megatron does not know, or that says something else than config.json.
    """
    read_words(words, megatron_index())
    values = megatron_values(words)
    config = read_hf_config(folder)
    check_hf_against_flags(config, argparse.Namespace(**values))
    if values["padded_vocab_size"] is not None:
        return int(values["padded_vocab_size"])
    multiple = int(values["make_vocab_size_divisible_by"])
    return math.ceil(int(config["vocab_size"]) / multiple) * multiple


class _Ranks:
    """The process group of torchrun, or this process alone."""

    def __enter__(self) -> Ranks:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        self._is_group = size > 1
        if not self._is_group:
            return Ranks()
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=_RANKS_TIMEOUT)

        def barrier() -> None:
            dist.barrier()

        return Ranks(dist.get_rank(), size, barrier)

    def __exit__(self, *rest: object) -> None:
        if self._is_group:
            import torch.distributed as dist

            dist.destroy_process_group()


class _Bar:
    """Progress: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, shows: bool) -> None:
        self._shows = shows
        self._last = 0.0

    def __enter__(self) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self._shows and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("converting", total=1)
        self._bar.start()
        return self._report

    def __exit__(self, *rest: object) -> None:
        self._bar.stop()

    def _report(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)
        is_due = time.monotonic() - self._last > 10.0 or done == total
        if self._shows and self._bar.disable and is_due:
            self._last = time.monotonic()
            sys.stderr.write(f"{done}/{total} {what}\n")
