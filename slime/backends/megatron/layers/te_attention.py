"""TransformerEngine's attention on packs: cuDNN's or FlashAttention; a ring under context parallelism."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from slime.backends.megatron.packs.pack import Packed


class PackedTEAttention(TEDotProductAttention):
    """TransformerEngine's attention on packs."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """[T, 1, heads x D] from [T, 1, heads, D]."""
        assert isinstance(packed_seq_params, Packed), "slime's attention runs on packs only"
        plan, ends = packed_seq_params.context, packed_seq_params.cu_seqlens_q
        longest = packed_seq_params.max_seqlen_q
        if plan is not None:  # the ring wants whole sequences, and knows who has which chunk
            ends, longest = plan.cu_sequences, plan.longest_sequence
        packs = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        out = super().forward(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type=attn_mask_type,
            packed_seq_params=packs,
        )
        return out.reshape(out.shape[0], 1, -1)
