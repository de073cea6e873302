"""Time and memory of log-probs from hidden states, with and without whole logits, on one GPU.

    python benchmarks/linear_log_probs.py [--tokens 32768] [--vocab 151936] [--hidden 2048]

Prints JSON: forward and backward milliseconds (best of five), GiB above the inputs at the peak, and
how far both ways are apart at 4,096 tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slime.training.linear_log_probs import OutputWeight, linear_log_probs_and_entropy
from slime.training.log_probs import log_probs_and_entropy

REPETITIONS = 5
ENTROPY_WEIGHT = 0.01
Outputs = tuple[Tensor, Tensor | None]
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Outputs]


def without_logits(hidden: Tensor, weight: Tensor, targets: Tensor, buffer: Tensor) -> Outputs:
    """Chunks of logits; the weight's gradient goes to the buffer."""
    output = OutputWeight(weight, buffer)
    return linear_log_probs_and_entropy(hidden, output, targets, needs_entropy=True)


def with_logits(hidden: Tensor, weight: Tensor, targets: Tensor, buffer: Tensor) -> Outputs:
    """All logits in bf16; the weight's gradient comes from autograd."""
    logits = hidden @ weight.t()
    return log_probs_and_entropy(logits, targets, needs_entropy=True, overwrite_logits=True)


def measure(way: Way, sizes: tuple[int, int, int], repetitions: int) -> tuple[Any, list[Tensor]]:
    """(figures, [log-probs, gradient of hidden states, gradient of the weight]) of one way."""
    tokens, vocab, width = sizes
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, width, **options).requires_grad_()
    weight = (torch.randn(vocab, width, **options) * 0.02).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device="cuda")
    factors = torch.randn(tokens, device="cuda")
    buffer = torch.zeros(vocab, width, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward: list[float] = []
    backward: list[float] = []
    log_probs = factors
    for _ in range(repetitions):
        hidden.grad = weight.grad = None
        buffer.zero_()
        start = _now()
        log_probs, entropy = way(hidden, weight, targets, buffer)
        forward.append(_now() - start)
        assert entropy is not None
        loss = (log_probs * factors).sum() + ENTROPY_WEIGHT * entropy.sum()
        start = _now()
        loss.backward()
        backward.append(_now() - start)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    figures = {"forward_ms": 1e3 * min(forward), "backward_ms": 1e3 * min(backward)}
    figures = {name: round(value, 1) for name, value in figures.items()}
    assert hidden.grad is not None
    of_weight = buffer if weight.grad is None else weight.grad.float()
    return figures | {"peak_gib": round(peak, 2)}, [log_probs.detach(), hidden.grad, of_weight]


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("tokens", 32_768), ("vocab", 151_936), ("hidden", 2_048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("linear_log_probs.py measures a CUDA GPU, and there is none")
    small = (4_096, options.vocab, options.hidden)
    ours, theirs = (measure(way, small, 1)[1] for way in (without_logits, with_logits))
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    sizes = (options.tokens, options.vocab, options.hidden)
    del ours, theirs
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "without_logits": measure(without_logits, sizes, REPETITIONS)[0],
        "with_logits": measure(with_logits, sizes, REPETITIONS)[0],
        "relative_difference": dict(
            zip(("log_probs", "grad_hidden", "grad_weight"), apart, strict=True)
        ),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
