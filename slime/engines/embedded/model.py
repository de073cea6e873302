"""ModelRunner: a Hugging Face causal LM that reads prompts and writes tokens over a SlotCache."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.config.quantization import is_quantized_checkpoint
from slime.engines.embedded.arrays import as_tensor
from slime.engines.embedded.attention import SLOTS, register_slots_attention
from slime.engines.embedded.cache import SlotCache
from slime.engines.embedded.fused import FUSED, FusedDecoder
from slime.engines.embedded.masks import CausalMasks
from slime.engines.embedded.norms import speed_up_norms
from slime.engines.embedded.shapes import padded_length
from slime.errors import EngineError

logger = logging.getLogger(__name__)

# In order of preference; the start-up self-check decides which one a model computes correctly with.
ATTENTION_CHOICES = (FUSED, SLOTS, "sdpa", "eager")
# Rows of [V] logits held at once when every position's log-prob is asked for.
_LOGIT_ROWS = 256


def load_model(path: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A causal LM of transformers from a folder, ready to infer, on CPU.

    Raises:
        EngineError: the folder holds no causal LM that transformers can load, or one in fewer bits.
    """
    import transformers

    if is_quantized_checkpoint(path):
        raise EngineError(
            f"{path} holds quantized weights, which the embedded engine for CPUs does not compute with; give the "
            "folder of the model in bf16 or fp32, or use SGLang on GPUs"
        )
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model = auto.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"cannot load a causal LM from {path}: {error}") from error
    model = model.eval().requires_grad_(False)
    speed_up_norms(model)
    return model


class ModelRunner:
    """Runs decoder and output layer of a model for the scheduler; every pass is in eval mode.

    Args:
        model: a transformers causal LM.
        attention: one of `ATTENTION_CHOICES`.
        context_length: most tokens of a request; by default what the config names.

    Raises:
        EngineError: no context length, or a model without a decoder and an output layer.
    """

    def __init__(
        self, model: Any, *, attention: str = SLOTS, context_length: int | None = None
    ) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.dtype: torch.dtype = model.dtype
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        if self._decoder is None or self._head is None:
            raise EngineError(f"{type(model).__name__} has no decoder or no output layer")
        self.vocab_size = int(self._head.weight.shape[0])
        self.context_length = _context_length(self.config, context_length)
        self.set_attention(attention)

    def set_attention(self, attention: str) -> None:
        """Switch the implementation of attention, or with `fused` that of the whole decoder.

        Raises:
            NotImplementedError: the model is none that the fused decoder knows.
        """
        register_slots_attention()
        self._fused = FusedDecoder(self.model) if attention == FUSED else None
        if self._fused is None:
            self.model.set_attn_implementation(attention)
        self.attention = attention
        self.masks = CausalMasks(self.config, additive=attention == "eager", dtype=self.dtype)

    def new_cache(self, max_slots: int) -> SlotCache:
        """An empty cache for this model."""
        return SlotCache(max_slots, padded_length(self.context_length))

    @torch.inference_mode()
    def prefill(self, cache: SlotCache, first_slot: int, ids: NDArray[np.int64]) -> Tensor:
        """Hidden states [B, Q, H] of whole prompts, whose KV goes to slots from `first_slot` on.

        Args:
            ids: [B, Q] prompts, padded on the right: under a causal mask what follows a prompt
                changes nothing in it.
        """
        num_rows, num_tokens = ids.shape
        positions = torch.arange(num_tokens)[None]
        cache.plan_prefill(first_slot, num_rows)
        if self._fused is not None:
            return self._fused.prefill(as_tensor(ids), cache)
        return self._run(ids, positions.expand(num_rows, -1), positions, num_tokens, cache)

    @torch.inference_mode()
    def decode(
        self, cache: SlotCache, ids: NDArray[np.int64], lengths: NDArray[np.int64], kv_length: int
    ) -> Tensor:
        """Logits [B, V] fp32 after one more token for each of the slots [0, B).

        Args:
            ids: [B] that token.
            lengths: [B] tokens each slot holds so far, so also the new token's position.
            kv_length: how many cached tokens to read; more than every entry of `lengths`.
        """
        positions = as_tensor(lengths)[:, None]
        cache.plan_decode(positions[:, 0], kv_length)
        if self._fused is not None:
            return self.logits(
                self._fused.decode(as_tensor(ids), positions[:, 0], kv_length, cache)
            )
        hidden = self._run(ids[:, None], positions, positions, kv_length, cache)
        return self.logits(hidden[:, 0])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] fp32 logits of hidden states [N, H]."""
        return self._head(hidden).float()

    @torch.inference_mode()
    def token_log_probs(self, hidden: Tensor, targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N] fp32 log-probs, temperature 1, of `targets` [N] after hidden states [N, H]."""
        chosen = as_tensor(targets)
        parts: list[Tensor] = []
        for start in range(0, len(targets), _LOGIT_ROWS):
            logits = self.logits(hidden[start : start + _LOGIT_ROWS])
            picked = logits.gather(1, chosen[start : start + _LOGIT_ROWS, None])[:, 0]
            parts.append(picked - torch.logsumexp(logits, -1))
        return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)

    @torch.inference_mode()
    def teacher_forced(self, ids: NDArray[np.int64]) -> Tensor:
        """[S, V] fp32 logits of one sequence by the model's own code, without cache or our
        masks."""
        with self._reference_attention():
            output = self.model(input_ids=as_tensor(ids)[None], use_cache=False)
        return output.logits[0].float()

    def _run(
        self,
        ids: NDArray[np.int64],
        positions: Tensor,
        mask_positions: Tensor,
        num_keys: int,
        cache: SlotCache,
    ) -> Tensor:
        output = self._decoder(
            input_ids=as_tensor(ids),
            attention_mask=self.masks.make(mask_positions, num_keys),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    @contextmanager
    def _reference_attention(self) -> Generator[None]:
        """Eager attention, which every model has, while the block runs."""
        ours = self.attention
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if ours != FUSED:
                self.model.set_attn_implementation(ours)


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of config, generation config and tokenizer together, as in SGLang."""
    found: set[int] = set()
    for source in (model.config.get_text_config(), model.generation_config, tokenizer):
        ids: Any = None if source is None else source.eos_token_id
        many = cast(list[int], ids if isinstance(ids, list) else [ids])
        found.update(many if ids is not None else [])
    return tuple(sorted(found))


def _context_length(config: Any, asked: int | None) -> int:
    trained: int | None = getattr(config, "max_position_embeddings", None)
    length = trained if asked is None else asked
    if length is None:
        raise EngineError("the model's config names no context length; give --context-length")
    if asked is not None and trained is not None and asked > trained:
        logger.warning("--context-length %d exceeds the %d the model was made for", asked, trained)
    return length
