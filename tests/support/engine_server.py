"""Starts engines and routers as real processes for tests: embedded ones, and the stock SGLang server."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.device import DEVICE

from slime.engines.ports import hold_port
from slime.engines.servers import ServerProcess, ServerSpec

# A server of SGLang starts in 25 to 60 s on two idle cores, two of them beside a trainer in 130.
START_TIMEOUT_S = 480.0
ROOT = Path(__file__).parents[2]
# What `make setup-sglang-cpu` made, and what stands in front of it (see its README).
SGLANG_CPU = ROOT / ".sglang-cpu"
SGLANG_STAND_INS = Path(__file__).parent / "sglang_cpu"


def engine_spec(model_path: Path, log_dir: Path, *options: str) -> ServerSpec:
    """How to start an embedded engine on a free port."""
    port = hold_port()
    command = [
        sys.executable, "-m", "slime.engines.embedded.server", "--model-path", str(model_path),
        "--port", str(port), *options,
    ]  # fmt: skip
    return ServerSpec(
        name=f"engine-{port}",
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/health",
        log_path=log_dir / f"engine-{port}.log",
        env={"OMP_NUM_THREADS": "1"},
    )


def sglang_spec(model_path: Path, log_dir: Path, *options: str) -> ServerSpec:
    """How to start the stock SGLang server on a free port.

    On a CPU (`SLIME_TEST_DEVICE` unset) it is that of `.sglang-cpu` with the stand-ins, in fp32; on
    CUDA the installed one as it is, in bf16, with the deterministic mode in which it heeds seeds, and
    what `SLIME_TEST_SGLANG_FLAGS` says.
    """
    if DEVICE == "cpu" and not SGLANG_CPU.is_dir():
        raise FileNotFoundError(f"no {SGLANG_CPU}; run make setup-sglang-cpu")
    port = hold_port()
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path),
        "--host", "127.0.0.1", "--port", str(port), "--device", DEVICE, "--skip-server-warmup",
        *options,
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1"}
    if DEVICE == "cpu":
        command += ["--dtype", "float32", "--attention-backend", "torch_native"]
        command += ["--disable-overlap-schedule", "--sleep-on-idle"]
        paths = [str(SGLANG_STAND_INS), str(SGLANG_CPU), os.environ.get("PYTHONPATH", "")]
        env |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    else:
        command += ["--dtype", "bfloat16", "--enable-deterministic-inference"]
        command += shlex.split(os.environ.get("SLIME_TEST_SGLANG_FLAGS", ""))
    return ServerSpec(
        name=f"sglang-{port}",
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/health",
        log_path=log_dir / f"sglang-{port}.log",
        env=env,
    )


def router_spec(log_dir: Path, *options: str) -> ServerSpec:
    """How to start the real router on a free port."""
    port = hold_port()
    command = [
        sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(hold_port()),
        "--policy", "round_robin", "--log-level", "warn",
        "--shutdown-grace-period-secs", "0", *options,
    ]  # fmt: skip
    return ServerSpec(
        name="router",
        command=tuple(command),
        url=f"http://127.0.0.1:{port}",
        health_path="/liveness",
        log_path=log_dir / "router.log",
    )


@contextmanager
def running(spec: ServerSpec) -> Iterator[ServerProcess]:
    """The server, answering, while the block runs."""
    process = ServerProcess(spec)
    try:
        process.wait_healthy(START_TIMEOUT_S)
        yield process
    finally:
        process.stop()
