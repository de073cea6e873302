"""Conversion of a large checkpoint: time and memory, Hugging Face to torch_dist and back.

    python benchmarks/convert.py [--layers 48] [--folder DIR]

A random checkpoint in the shape of Qwen3-30B-A3B, bf16, written as published ones are, in files of at
most 4 GiB; it takes twice its size of disk: the first folder's weights are made anew to compare with the
last one's. Each way runs as its tool, in a process of its own. Prints JSON: bytes, seconds, GB/s and the
process's largest resident memory, and whether all bits came back. Resident memory counts the pages of
files that are open, too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from shapes import model_config
from torch import Tensor

from slime.checkpoint.dims import ModelDims
from slime.checkpoint.hf import HfFolder
from slime.checkpoint.hf_writer import write_hf_folder
from slime.checkpoint.mapping import load_mapping

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 4 * 2**30


def tensors(layers: int, threads: int) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's; every tensor of its own seed, so that none can stand for another."""
    dims = ModelDims.from_hf_config(model_config("qwen3-30b-a3b", layers))
    shapes = load_mapping("qwen3_moe").hf_parameters(dims)

    def make(number: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        # Exponents from 2^-3 down: no NaN, which would not equal itself.
        return (bits & ~0x4000).view(torch.bfloat16)

    coming: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, (name, shape) in enumerate(shapes.items()):
            coming.append((name, pool.submit(make, number, tuple(shape))))
            while len(coming) > 4 * threads or (coming and number == len(shapes) - 1):
                ready, future = coming.popleft()
                yield ready, future.result()


def write_random(folder: Path, layers: int, threads: int) -> None:
    """The checkpoint's folder."""
    source = folder.with_name("config-only")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(model_config("qwen3-30b-a3b", layers)))
    write_hf_folder(
        folder, tensors(layers, threads), config_from=source, max_shard_bytes=SHARD_BYTES
    )


def is_same(folder: Path, layers: int, threads: int) -> bool:
    """Whether a folder has the checkpoint's tensors and no others, bit for bit."""
    with HfFolder(folder) as found:
        names = set(found.names())
        for name, tensor in tensors(layers, threads):
            if name not in names or not torch.equal(found.tensor(name), tensor):
                return False
            names.remove(name)
    return not names


def run_tool(name: str, *words: str) -> dict[str, Any]:
    """One conversion in a process of its own."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / name), *words], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, name
    peak = usage.ru_maxrss * 1024
    return {"seconds": round(time.monotonic() - start, 1), "peak_rss_gib": round(peak / 2**30, 2)}


def num_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Conversion of a large checkpoint: time and memory."
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2, help="that make the checkpoint")
    parser.add_argument("--folder", type=Path, help="on a disk with room; a temporary one if unset")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        origin, saved, back = root / "hf", root / "torch_dist", root / "back"
        write_random(origin, options.layers, options.threads)
        size = num_bytes(origin)
        there = run_tool(
            *("convert_hf_to_torch_dist.py", "--hf-checkpoint", str(origin), "--save", str(saved))
        )
        for file in origin.glob("*.safetensors"):  # only its settings are read below
            file.unlink()
        home = run_tool(
            *("convert_torch_dist_to_hf.py", "--input-dir", str(saved), "--output-dir", str(back)),
            *("--origin-hf-dir", str(origin), "--chunk-size", f"{SHARD_BYTES}B"),
        )
        same = is_same(back, options.layers, options.threads)
        for part in (there, home):
            part["gb_per_s"] = round(size / part["seconds"] / 1e9, 3)
        report = {
            "shape": "qwen3-30b-a3b",
            "layers": options.layers,
            "gigabytes": round(size / 1e9, 2),
            "largest_file_gib": SHARD_BYTES / 2**30,
            "hf_to_torch_dist": there,
            "torch_dist_to_hf": home,
            "same_bits": same,
        }
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
