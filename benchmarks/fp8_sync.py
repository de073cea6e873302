r"""Rollout weights in 8 bits on one card: are an engine's log-probs after a sync those of a fresh server?

    python benchmarks/fp8_sync.py                      # a dense and a mixture-of-experts model, some minutes
    python benchmarks/fp8_sync.py --device cpu         # the same steps without 8 bits, to try the script

For each model two random bf16 folders A and B are made and converted as tools/convert_hf_to_fp8.py does. A stock
SGLang server starts on A's fp8 folder and proves that tensors one by one bring what files do. B's bf16 tensors, on the
card, are then quantized and sent as in a run (CUDA IPC; `slime.weights.local`), A's after them through files
(`slime.weights.disk`). Log-probs of given tokens are compared with those of servers that loaded the converted
folders. Prints JSON; the exit code is 1 when a bit of a quantized tensor or a log-prob differs by more than the
tolerance.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from torch import Tensor

from slime.checkpoint.folders import hf_to_fp8
from slime.checkpoint.fp8_format import Fp8Format
from slime.checkpoint.hf import HfFolder
from slime.engines.control import EngineControl
from slime.engines.ports import hold_port
from slime.engines.protocol import PauseMode
from slime.engines.servers import ServerProcess, ServerSpec
from slime.engines.sglang.invitation import RECEIVER
from slime.weights.disk import DiskTransport, prove_tensors
from slime.weights.local import LocalControl, LocalTransport, Ranks
from slime.weights.sync import SyncReport, sync_weights
from slime.weights.versions import VersionFolder, WholeVersions

# The same kernels on the same bits: what differs is the order of sums in a batch.
TOLERANCE = 1e-3
VOCAB = 1024
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 1024,
    "initializer_range": 0.05, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
PROMPTS = [[(7 * i * i + 13 * n) % VOCAB for i in range(24 + 40 * n)] for n in range(4)]


def make_folder(folder: Path, *, has_experts: bool, seed: int) -> Path:
    """A random model in bf16, as transformers saves it."""
    import transformers

    torch.manual_seed(seed)
    name = "Qwen3Moe" if has_experts else "Qwen3"
    config: Any = getattr(transformers, f"{name}Config")(
        **SHAPE, **(EXPERTS if has_experts else {})
    )
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@contextmanager
def server(folder: Path, options: argparse.Namespace, name: str) -> Iterator[str]:
    """Address of a stock SGLang server while the block runs."""
    port, on_cpu = hold_port(), options.device == "cpu"
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--device", options.device, "--random-seed", "0", "--skip-tokenizer-init",
        "--skip-server-warmup", "--custom-weight-loader", RECEIVER, "--max-total-tokens", "8192",
        "--mem-fraction-static", "0.2", *options.words.split(),
    ]  # fmt: skip
    if on_cpu:
        command += ["--dtype", "float32", "--attention-backend", "torch_native"]
        command += ["--disable-overlap-schedule"]
    else:
        command += ["--dtype", "bfloat16", "--disable-cuda-graph", "--mm-feature-transport", "cpu"]
    spec = ServerSpec(
        name=name,
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/health",
        log_path=Path(options.logs) / f"{name}.log",
        env={"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} if on_cpu else {},
    )
    process = ServerProcess(spec)
    try:
        process.wait_healthy(options.start_limit_s)
        yield spec.url
    finally:
        process.stop()


def log_probs(url: str) -> Tensor:
    """[tokens] of all prompts, one request each."""
    found: list[float] = []
    for ids in PROMPTS:
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        reply = httpx.post(f"{url}/generate", json=body, timeout=120.0, trust_env=False).json()
        found += [row[0] for row in reply["meta_info"]["input_token_logprobs"][1:]]
    return torch.tensor(found)


def weights_of(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """A trainer's weights: bf16, on its device."""
    with HfFolder(folder) as files:
        for name in files.names():
            yield name, files.tensor(name).to(device)


def as_rollout(folder: Path, form: Fp8Format | None, device: str) -> Iterator[tuple[str, Tensor]]:
    """What a sync sends of them."""
    named = weights_of(folder, device)
    return named if form is None else form.of(named)


def count_differing(folder: Path, converted: Path, form: Fp8Format, device: str) -> int:
    """Tensors whose bits on the device are not those that the converter wrote."""
    written: dict[str, Tensor] = {}
    for file in converted.glob("*.safetensors"):
        written |= load_file(file)
    made = {name: tensor.cpu() for name, tensor in form.of(weights_of(folder, device))}
    assert made.keys() == written.keys(), sorted(made.keys() ^ written.keys())[:4]
    return sum(
        not torch.equal(
            made[name].contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        )
        for name, tensor in written.items()
    )


def send(control: EngineControl, named: Any, device: str) -> SyncReport:
    """One sync as colocated sides do it."""
    local = LocalControl(control, 0)
    transport = LocalTransport(
        control,
        local,
        Ranks(0, lambda value: [value]),
        first_seed=0,
        host="127.0.0.1",
        timeout_s=120.0,
        way="ipc" if device == "cuda" else "gloo",
    )
    transport.open()
    try:
        return sync_weights(
            named,
            control=local,
            transport=transport,
            version="2",
            bucket_bytes=4 * 2**20,
            verify=True,
            pause_mode=PauseMode.ABORT,
        )
    finally:
        transport.close()


def try_model(
    options: argparse.Namespace, *, has_experts: bool, power_of_two: bool
) -> dict[str, Any]:
    """All steps with one model; the figures."""
    work, device = Path(tempfile.mkdtemp(prefix="fp8-sync-")), options.device
    plain = {x: make_folder(work / x, has_experts=has_experts, seed=n) for n, x in enumerate("AB")}
    small, form = plain, None
    if device == "cuda":
        small = {name: work / f"{name}-fp8" for name in plain}
        for name, folder in plain.items():
            hf_to_fp8(folder, small[name], power_of_two=power_of_two)
        form = Fp8Format.read(str(small["A"]))
        assert form is not None
    name = f"{'experts' if has_experts else 'dense'}{'-ue8m0' if power_of_two else ''}"
    result: dict[str, Any] = {
        "model": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "fp8": form is not None,
        "tensors_that_differ_from_the_converter": None
        if form is None
        else count_differing(plain["B"], small["B"], form, device),
    }
    start = time.monotonic()
    with server(small["A"], options, f"{name}-A") as url:
        result["start_s"] = round(time.monotonic() - start, 1)
        control = EngineControl((url,), timeout_s=120.0)
        fresh_a, again = log_probs(url), log_probs(url)
        result["repeated"] = float((fresh_a - again).abs().max())
        start = time.monotonic()
        prove_tensors(control, small["A"], host="127.0.0.1", timeout_s=120.0)
        result["prove_s"] = round(time.monotonic() - start, 3)
        result["proven"] = float((log_probs(url) - fresh_a).abs().max())
        report = send(control, as_rollout(plain["B"], form, device), device)
        result |= {"sync_s": round(report.total_s, 3), "tensors": report.num_tensors}
        synced_b = log_probs(url)
        versions = WholeVersions(
            VersionFolder(work / "versions", config_from=small["A"], keeps=False, patience_s=0.0)
        )
        disk = DiskTransport(control, versions, host="127.0.0.1", timeout_s=120.0)
        disk.open()
        named = as_rollout(plain["A"], form, device)
        report = disk.sync(named, "3", verify=True, pause_mode=PauseMode.ABORT)
        result |= {"disk_s": round(report.total_s, 3), "disk_verified_by": report.verified_by}
        disk_a = log_probs(url)
        control.close()
    with server(small["B"], options, f"{name}-B") as url:
        fresh_b = log_probs(url)
    result |= {
        "log_probs": fresh_b.numel(),
        "models_apart": float((fresh_a - fresh_b).abs().mean()),
        "sync_against_fresh": float((synced_b - fresh_b).abs().max()),
        "disk_against_fresh": float((disk_a - fresh_a).abs().max()),
    }
    off = max(result["proven"], result["sync_against_fresh"], result["disk_against_fresh"])
    has_bits = not result["tensors_that_differ_from_the_converter"]
    return result | {"ok": has_bits and off <= TOLERANCE and result["models_apart"] > 0.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", default="dense,dense-ue8m0,experts", help="some of the default")
    parser.add_argument("--words", default="", help="more options of the servers")
    parser.add_argument("--start-limit-s", type=float, default=300)
    parser.add_argument("--logs", default=None, help="folder for the servers' logs")
    options = parser.parse_args()
    options.logs = options.logs or tempfile.mkdtemp(prefix="fp8-sync-logs-")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    is_ok = True
    for name in options.models.split(","):
        kind, _, scales = name.partition("-")
        result = try_model(options, has_experts=kind == "experts", power_of_two=scales == "ue8m0")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        is_ok = is_ok and bool(result["ok"])
    if not is_ok:
        sys.stderr.write(f"the servers' logs: {options.logs}\n")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
