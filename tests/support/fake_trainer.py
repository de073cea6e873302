"""FakeTrainer: the Trainer protocol on one tiny torch model, without Megatron or processes.

Data-parallel ranks are threads (`run_ranks`) that share a `VirtualGroup`; context-parallel ranks
are threads inside a rank that share one autograd graph. Everything is fp64, so that results of
different cuts may be compared to the last few digits.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from slime.data.batch import RolloutBatch
from slime.training.interface import (
    LossFn,
    LossTerms,
    Metrics,
    ModelTag,
    ParallelLayout,
    TokenView,
    TrainStep,
)
from slime.training.log_probs import log_probs_and_entropy

_DEADLINE_S = 30.0


class VirtualGroup:
    """Ranks that are threads of this process; the sum keeps the autograd graph."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=_DEADLINE_S)

    def all_reduce(self, rank: int, tensor: Tensor) -> Tensor:
        """Sum over ranks, in rank order, so that all ranks get the same bits."""
        self._slots[rank] = tensor
        self._barrier.wait()
        total = sum((slot for slot in self._slots if slot is not None), torch.zeros_like(tensor))
        self._barrier.wait()
        return total

    def abort(self) -> None:
        """Wake the other ranks after one of them failed."""
        self._barrier.abort()


def run_ranks[T](size: int, work: Callable[[int, VirtualGroup], T]) -> list[T]:
    """`work(rank, group)` on `size` threads at once; their results in rank order."""
    group = VirtualGroup(size)

    def guarded(rank: int) -> T:
        try:
            return work(rank, group)
        except threading.BrokenBarrierError:
            raise
        except Exception:
            group.abort()
            raise

    if size == 1:
        return [guarded(0)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


class TinyModel(nn.Module):
    """Causal toy language model: next-token logits from the mean of the embeddings so far."""

    def __init__(self, vocab_size: int, hidden_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab_size, hidden_size)
        self.embedding = nn.Parameter(torch.randn(shape, generator=generator).double())
        self.head = nn.Parameter(torch.randn(shape, generator=generator).double())

    def forward(self, tokens: Tensor) -> Tensor:
        """[S] ids -> [S, V] logits."""
        counts = torch.arange(1, tokens.numel() + 1, dtype=torch.float64)[:, None]
        return torch.tanh(self.embedding[tokens].cumsum(0) / counts) @ self.head.T


class FakeTrainer:
    """One data-parallel rank. `calls` lists the methods called; `gradient` is the last step's."""

    def __init__(
        self,
        *,
        vocab_size: int = 11,
        hidden_size: int = 6,
        seed: int = 0,
        learning_rate: float = 0.5,
        temperature: float = 1.0,
        cp_size: int = 1,
        dp_rank: int = 0,
        dp_group: VirtualGroup | None = None,
    ) -> None:
        actor = TinyModel(vocab_size, hidden_size, seed)
        self.models = {
            ModelTag.ACTOR: actor,
            ModelTag.OLD_ACTOR: copy.deepcopy(actor),
            ModelTag.REF: TinyModel(vocab_size, hidden_size, seed + 1000),
        }
        self.calls: list[str] = []
        self.gradient = torch.zeros(0)
        self._group = dp_group or VirtualGroup(1)
        self._learning_rate = learning_rate
        self._temperature = temperature
        self.layout = ParallelLayout(
            world_size=self._group.size, rank=dp_rank, dp_size=self._group.size, dp_rank=dp_rank
        )
        self._cp_size = cp_size

    def load(self) -> int:
        return 0

    def log_probs(self, batch: RolloutBatch, model: ModelTag) -> list[Tensor]:
        self.calls.append(f"log_probs:{model}")
        with torch.no_grad():
            return [self._forward(batch, p, model)[0].float() for p in range(len(batch))]

    def values(self, batch: RolloutBatch) -> list[Tensor]:
        raise NotImplementedError("FakeTrainer has no critic")

    def train_step(self, step: TrainStep, loss_fn: LossFn) -> Metrics:
        self.calls.append("train_step")
        model = self.models[ModelTag.ACTOR]
        model.zero_grad()
        sums: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
        for micro_batch in step.plan.micro_batches:
            terms = self._micro_batch_terms(step, micro_batch, loss_fn)
            loss = torch.stack([term.loss for term in terms]).sum()
            loss.backward()
            for name, value in _summed(terms, loss).items():
                sums[name] = sums.get(name, torch.zeros(())) + value
        self._optimizer_step(model)
        totals = self.sum_over_dp(torch.stack([value.double() for value in sums.values()])).tolist()
        metrics = dict(zip(sums, totals, strict=True))
        return {**metrics, "grad_norm": float(self.gradient.norm())}

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        return self._group.all_reduce(self.layout.dp_rank, tensor)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.models[ModelTag.ACTOR].state_dict().items()

    def save(self, rollout_id: int) -> None:
        raise NotImplementedError("FakeTrainer writes no checkpoint")

    def save_hf(self, path: str) -> None:
        raise NotImplementedError("FakeTrainer writes no checkpoint")

    def sleep(self) -> None:
        pass

    def wake_up(self) -> None:
        pass

    def _forward(
        self, batch: RolloutBatch, position: int, model: ModelTag, needs_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropy of one sample's response, [R] fp64."""
        tokens = batch.tokens.rows()[position]
        length = batch.response_lengths[position]
        start = tokens.numel() - length
        logits = self.models[model](tokens)[start - 1 : tokens.numel() - 1]
        return log_probs_and_entropy(
            logits,
            tokens[start:],
            temperature=self._temperature,
            needs_entropy=needs_entropy,
            chunk_size=3,
        )

    def _micro_batch_terms(
        self, step: TrainStep, micro_batch: tuple[int, ...], loss_fn: LossFn
    ) -> list[LossTerms]:
        outputs = [
            self._forward(step.batch, p, ModelTag.ACTOR, step.needs_entropy) for p in micro_batch
        ]
        log_probs = torch.cat([log_probs for log_probs, _ in outputs])
        entropy = (
            torch.cat([e for _, e in outputs if e is not None]) if step.needs_entropy else None
        )
        columns = {n: torch.cat([c[p] for p in micro_batch]) for n, c in step.columns.items()}
        lengths = torch.tensor([step.batch.response_lengths[p] for p in micro_batch])
        segments = torch.arange(len(micro_batch)).repeat_interleave(lengths)

        def on_cp_rank(rank: int, group: VirtualGroup) -> LossTerms:
            mine = torch.arange(rank, log_probs.numel(), self._cp_size)
            local = segments[mine]

            def segment_sum(values: Tensor) -> Tensor:
                zeros = torch.zeros(len(micro_batch), dtype=values.dtype)
                return group.all_reduce(rank, zeros.index_add(0, local, values))

            view = TokenView(
                log_probs=log_probs[mine],
                entropy=None if entropy is None else entropy[mine],
                columns={name: column[mine] for name, column in columns.items()},
                segments=local,
                num_segments=len(micro_batch),
                segment_sum=segment_sum,
            )
            return loss_fn(view)

        return run_ranks(self._cp_size, on_cp_rank)

    def _optimizer_step(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.gradient = self.sum_over_dp(torch.cat([grad.flatten() for grad in grads]))
        with torch.no_grad():
            offset = 0
            for parameter in parameters:
                part = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
                parameter -= self._learning_rate * part
                offset += parameter.numel()


def _summed(terms: list[LossTerms], loss: Tensor) -> dict[str, Tensor]:
    sums = {"loss": loss.detach()}
    for term in terms:
        for name, value in term.metrics.items():
            assert not value.requires_grad, f"metric {name} carries a gradient"
            sums[name] = sums.get(name, torch.zeros(())) + value
    return sums
