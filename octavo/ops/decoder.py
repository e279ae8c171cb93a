"""All layers of a decoder in one call: for small batches on the CPU, where dispatch would cost more than arithmetic.

A model whose layers fit (`DecoderStack` says what it needs) may hand its whole stack over; the result is that of the
layers one by one, but for the order of fp32 sums. Others, and other devices, run layer by layer.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.kernels.spec import AttentionTensors
from octavo.ops.gguf_groups import GROUP
from octavo.ops.linear import ROWS, QuantizedWeight
from octavo.ops.metadata import AttentionMetadata

if TYPE_CHECKING:
    from octavo.kernels.cpu.decoder import DecoderLayerParts, LinearParts


class DecoderStack:
    """Pre-norm layers x + attn(norm(x)), x + down(silu(gate) · up)(norm(x)) with quantised weights, then a last norm.

    All weights have one type, head_dim and the rotary dimensions are multiples of 32 with halves side by side, scores
    have neither softcap nor sink, caches are fp32 or fp16.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rms_norm_eps: float,
        softmax_scale: float,
        layers: Sequence["LayerWeights"],
        final_norm: Tensor,
    ) -> None:
        from octavo.kernels.cpu import decoder  # brings llvmlite

        down = layers[0].down
        self._shape = decoder.DecoderShape(
            hidden_size=down.shape[0],
            intermediate_size=down.shape[1],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=rms_norm_eps,
            softmax_scale=softmax_scale,
            bits=down.bits,
            has_mins=down.mins is not None,
            wide_scales=down.scales.dtype == torch.float32,
            zero_point=down.zero_point,
        )
        self._parts = [layer.parts() for layer in layers]  # keeps alive what the table points to
        self._make_table = decoder.layer_table
        self._table = self._make_table(self._parts)
        self._final_norm = _norm(final_norm)
        self._run, self._set_caches = decoder.decoder_stack, decoder.set_caches
        self.cache_dtypes = decoder.cache_dtypes()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        other = copy(self)
        other._parts = deepcopy(self._parts, memo)
        other._final_norm = deepcopy(self._final_norm, memo)
        other._table = self._make_table(other._parts)  # it holds addresses
        return other

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """hidden (T, hidden_size) fp32, used up; cos, sin (T, rotary_dim / 2) fp32; each layer's keys and values
        (num_blocks, block_size, Hkv, head_dim) of one of `cache_dtypes`. Stores the new keys and values; returns
        (T, hidden_size) fp32."""
        table = self._table.clone()  # another thread may run the same stack over another cache
        self._set_caches(table, [k for k, _ in caches], [v for _, v in caches])
        k, v = caches[0]
        tensors = AttentionTensors(
            cu_seqlens_q=metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            seqused_k=metadata.cache_seqlens,
            block_table=metadata.block_table,
        )
        return self._run(
            hidden,
            self._shape,
            table,
            self._final_norm,
            cos.contiguous(),
            sin.contiguous(),
            metadata.slot_mapping,
            k,
            v,
            tensors,
        )


class LayerWeights:
    """What one layer of a `DecoderStack` computes with; window_left as in flash-attn's window_size, −1 for none."""

    def __init__(
        self,
        *,
        attn_norm: Tensor,
        mlp_norm: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        qkv: QuantizedWeight,
        qkv_bias: Tensor | None,
        o: QuantizedWeight,
        o_bias: Tensor | None,
        gate_up: QuantizedWeight,
        gate_up_bias: Tensor | None,
        down: QuantizedWeight,
        down_bias: Tensor | None,
        window_left: int,
    ) -> None:
        self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm = attn_norm, mlp_norm, q_norm, k_norm
        self.linears = [(qkv, qkv_bias), (o, o_bias), (gate_up, gate_up_bias), (down, down_bias)]
        self.down = down
        self.window_left = window_left

    def refuses(self) -> str | None:
        """Why these weights cannot be part of a stack, or None."""
        kinds = {(w.bits, w.zero_point, w.mins is None, w.scales.dtype) for w, _ in self.linears}
        if len(kinds) != 1:
            return f"weights have several types: {sorted({w.qtype for w, _ in self.linears})}"
        odd = [w for w, _ in self.linears if w.shape[0] % ROWS or w.shape[1] % GROUP]
        return f"outputs of {odd[0]!r} are no multiple of {ROWS}" if odd else None

    def parts(self) -> "DecoderLayerParts":
        """As the kernel takes them."""
        from octavo.kernels.cpu.decoder import DecoderLayerParts

        qkv, o, gate_up, down = (_linear_parts(w, bias) for w, bias in self.linears)
        q_norm = None if self.q_norm is None else _norm(self.q_norm)
        k_norm = None if self.k_norm is None else _norm(self.k_norm)
        return DecoderLayerParts(
            _norm(self.attn_norm), _norm(self.mlp_norm), q_norm, k_norm, qkv, o, gate_up, down, self.window_left
        )


def _norm(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def _linear_parts(weight: QuantizedWeight, bias: Tensor | None) -> "LinearParts":
    from octavo.kernels.cpu.decoder import LinearParts

    if bias is not None:
        bias = F.pad(bias.detach().float(), (0, -len(bias) % ROWS))
    return LinearParts(weight.codes, weight.scales, weight.mins, bias)
