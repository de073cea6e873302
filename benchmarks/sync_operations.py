r"""What a weight sync costs for each tensor: CPU time and torch operations, by phase, without a GPU.

    OMP_NUM_THREADS=1 python benchmarks/sync_operations.py [--gpus 2 --words "--expert-model-parallel-size 2"]

Names, layers and experts are those of Qwen3-30B-A3B, the matrices are tiny, and a bucket has as many tensors
as one of 1 GiB: what is left is the work that does not depend on bytes. Each trainer rank feeds an engine
rank of its own, our receiver in a thread, whose model copies as SGLang's does with as many tensor-parallel
ranks. Bytes cross by one plain copy, which is not counted. Checksums take the way of a card, whose kernel is
left out: sizes are compared here, no bits, unless --cpu-checksums is given. Prints JSON of rank 0: medians
over syncs of microseconds of CPU for each tensor, and torch operations of one sync for each tensor: `views`,
which only a host makes, and `kernels`, which a card would launch (a call for a list of tensors is one of
them). `verify` has besides checksums what belongs to no other phase.
"""

import argparse
import json
import os
import queue
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from shapes import model_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import run_all_ranks, start_trainer, trainer_parser

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class Phases:
    """What one thread did in each phase; a phase inside another one is not counted in that.

    Attributes:
        seconds: of CPU.
        views, kernels: operations that make views, and others; counted while `counts` is set.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the block does."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def count(self, func: Any) -> None:
        """One operation."""
        if self._open:
            counted = self.views if func.is_view else self.kernels
            counted[self._open[-1]] += 1

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def steps(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        """`items`, the making of each as a phase."""
        while True:
            with self.phase(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _lap(self) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Counting(TorchDispatchMode):
    """Counts every operation of this thread."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self._phases = phases

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._phases.count(func)
        return func(*args, **(kwargs or {}))


class Wire:
    """A process group of two threads: what the trainer broadcasts, the engine copies."""

    def __init__(self, engine: Phases) -> None:
        self._sent: queue.Queue[Tensor] = queue.Queue()
        self._engine = engine

    def member(self, is_trainer: bool) -> Any:
        return _Member(self._sent, None if is_trainer else self._engine)


class _Member:
    def __init__(self, sent: "queue.Queue[Tensor]", engine: Phases | None) -> None:
        self._sent, self._engine = sent, engine
        self._flat: Tensor | None = None

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> Any:
        del options
        if self._engine is None:
            self._sent.put(tensors[0])
            return self
        return _Arriving(self._sent, self._engine, tensors[0])

    def wait(self, *args: Any) -> None:
        """The trainer need not."""


class _Arriving:
    def __init__(self, sent: "queue.Queue[Tensor]", engine: Phases, flat: Tensor) -> None:
        self._sent, self._engine, self._flat = sent, engine, flat

    def wait(self, *args: Any) -> None:
        with self._engine.phase("bytes"):
            self._flat.copy_(self._sent.get(timeout=60))


class EngineModel(torch.nn.Module):
    """One tensor-parallel rank of a model as SGLang has it: experts of a layer in two stacks."""

    def __init__(
        self, shape: dict[str, Any], shapes: dict[str, tuple[int, ...]], rank: int, size: int
    ) -> None:
        super().__init__()
        self._rank, self._size = rank, size
        layers, experts = shape["num_hidden_layers"], shape["num_experts"]
        ffn, hidden = shape["moe_intermediate_size"] // size, shape["hidden_size"]
        self.w13 = stacks(layers, experts, 2 * ffn, hidden)
        self.w2 = stacks(layers, experts, hidden, ffn)
        self.others = torch.nn.ParameterDict(
            {
                name.replace(".", "_"): torch.nn.Parameter(torch.zeros(sizes), False)
                for name, sizes in shapes.items()
                if _EXPERT.fullmatch(name) is None
            }
        )

    @torch.no_grad()
    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Each tensor by its name; a rank takes its part of an expert, and all of what is no expert."""
        for name, tensor in weights:
            if found := _EXPERT.fullmatch(name):
                self._load_expert(int(found[1]), int(found[2]), found[3], tensor)
                continue
            self.others[name.replace(".", "_")].data.copy_(tensor)

    def _load_expert(self, layer: int, expert: int, kind: str, tensor: Tensor) -> None:
        dim = 1 if kind == "down" else 0
        part = tensor.shape[dim] // self._size
        tensor = tensor.narrow(dim, self._rank * part, part)
        if kind == "down":
            self.w2[layer].data[expert].copy_(tensor)
        else:
            half = 0 if kind == "gate" else part
            self.w13[layer].data[expert].narrow(0, half, part).copy_(tensor)


def stacks(layers: int, *sizes: int) -> torch.nn.ParameterList:
    """A stack of experts for each layer."""
    return torch.nn.ParameterList(
        torch.nn.Parameter(torch.zeros(*sizes), False) for _ in range(layers)
    )


class Control:
    """An engine's own rank in a thread, in place of `EngineControl`.

    Args:
        model: the engine's.
        phases: of what its thread does.
    """

    urls = ("engine",)
    timeout_s = 60.0

    def __init__(self, model: EngineModel, phases: Phases) -> None:
        self._model, self._phases = model, phases
        self.counts = False

    def pause(self, mode: str) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...

    def get_all(self, path: str, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"tp_size": 1}]

    def post_all(self, path: str, body: Any) -> None: ...

    def start_post_all(self, path: str, body: Any) -> list[Any]:
        """Run the receiver with the invitation."""
        import base64
        import pickle

        (payload,) = body(0)["serialized_named_tensors"]
        named = pickle.loads(base64.b64decode(payload))  # ours, from this process
        answer: Future[Any] = Future()
        threading.Thread(target=self._take, args=(named, answer), daemon=True).start()
        return [answer]

    def _take(self, named: Any, answer: "Future[Any]") -> None:
        from slime.engines.sglang import receiver

        counting = Counting(self._phases) if self.counts else nullcontext()
        with self._phases.phase("engine: metadata"), counting:
            receiver.receive(self._model, named)
        answer.set_result({"success": True})


def use_kernel() -> None:
    """Checksums as on a card, all but the kernel itself: in its place sizes are added up."""
    from slime.engines import checksum, checksum_triton

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self

        def __call__(self, starts: Tensor, counts: Tensor, *args: Any, **kwargs: Any) -> None:
            args[3].copy_(counts)

    checksum_triton._rows = Launch()
    checksum._has_kernel = lambda tensors: True


def run_rank(options: argparse.Namespace, rank: int) -> None:
    """All syncs of one rank; rank 0 prints."""
    from slime.checkpoint.convert import megatron_flags_from_hf
    from slime.cli.parse import load_config
    from slime.engines.sglang import copies, receiver
    from slime.weights import sender, sync
    from slime.weights.receiver import ReceiverTransport

    shape = model_config(options.model, options.layers)
    words = (
        f"--hf-checkpoint {options.folder} --num-rollout 1 --rollout-batch-size 8 --debug-train-only "
        "--n-samples-per-prompt 1 --global-batch-size 8 --lr 1e-6 --device cpu --rollout-num-gpus 1 "
        f"--actor-num-gpus-per-node {options.gpus} --disable-rollout-global-dataset {options.words}"
    ).split()
    config = load_config([*words, *megatron_flags_from_hf(shape)])
    trainer = start_trainer(config, options, rank, has_optimizer=False)
    torch.manual_seed(rank)
    with torch.no_grad():
        for chunk in trainer._bare:
            for weight in chunk.parameters():
                weight.normal_()

    ours, engines = Phases(), Phases()
    wire = Wire(engines)
    sender.make_group = lambda invitation, store: wire.member(is_trainer=True)
    receiver.make_group = lambda invitation, store: wire.member(is_trainer=False)
    copies.Copies.load = engines.wrapped("engine: load", copies.Copies.load)
    make_buckets = sync.make_buckets
    sync.make_buckets = lambda named, size: ours.steps("gather", make_buckets(named, size))
    if not options.cpu_checksums:
        use_kernel()
    start = receiver.start_strip_checksums
    receiver.start_strip_checksums = engines.wrapped("engine: checksums", start)
    architecture = trainer._architecture
    shapes = architecture.mapping.hf_parameters(architecture.dims)
    control = Control(EngineModel(shape, shapes, rank, options.gpus), engines)
    transport = ReceiverTransport(control, host="127.0.0.1", timeout_s=60.0, way="gloo")
    transport.start = ours.wrapped("send", transport.start)
    transport.taken = ours.wrapped("answers", transport.taken)
    transport.open()
    times: list[dict[str, float]] = []
    counts: dict[str, Any] = {}
    reports: list[Any] = []
    for number in range(options.syncs + 3):
        torch.distributed.barrier()
        for phases in (ours, engines):
            phases.seconds.clear(), phases.views.clear(), phases.kernels.clear()
        control.counts = number == 2
        counting = Counting(ours) if control.counts else nullcontext()
        with ours.phase("verify"), counting:
            report = sync.sync_weights(
                trainer.named_weights(),
                control=control,
                transport=transport,
                version=str(number),
                bucket_bytes=options.bucket_kib * 2**10,
                verify=True,
            )
        each = 1 / report.num_tensors
        seconds = {**ours.seconds, **engines.seconds}
        if control.counts:
            counts = {
                kind: {
                    name: round(count * each, 3)
                    for phases in (ours, engines)
                    for name, count in sorted(getattr(phases, kind).items())
                    if name != "bytes"
                }
                for kind in ("views", "kernels")
            }
        elif number > 2:
            times.append({name: 1e6 * each * value for name, value in seconds.items()})
        reports.append(report)
    if rank == 0:
        names = [name for name in times[0] if name != "bytes"]
        out = {
            "model": options.model,
            "layers": shape["num_hidden_layers"],
            "ranks": options.gpus,
            "words": options.words,
            "tensors": reports[0].num_tensors,
            "buckets": reports[0].num_buckets,
            "syncs": len(times),
            "cpu_us_per_tensor": {
                name: round(statistics.median(t[name] for t in times), 2) for name in names
            },
            "total_us": round(statistics.median(sum(t[n] for n in names) for t in times), 2),
            **counts,
            "same_digest": len({report.digest for report in reports}) == 1,
        }
        sys.stdout.write(json.dumps(out) + "\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    transport.close()


def main() -> None:
    parser = trainer_parser("CPU time and torch operations of a weight sync.")
    parser.set_defaults(model="many-experts")
    parser.add_argument("--syncs", type=int, default=7)
    parser.add_argument("--bucket-kib", type=int, default=660)
    parser.add_argument(
        "--cpu-checksums", action="store_true", help="by torch's own operations, as on a CPU"
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.rank is None:
        folder = Path(tempfile.mkdtemp())
        shape = model_config(options.model, options.layers)
        (folder / "config.json").write_text(json.dumps(shape))
        sys.argv += ["--folder", str(folder)]
        sys.exit(run_all_ranks(__file__, options))
    run_rank(options, options.rank)


if __name__ == "__main__":
    main()
