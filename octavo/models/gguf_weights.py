"""A GGUF file as a source of weights: its names, its row orders, its quantised types."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.models.ggml_dequantize import dequantize
from octavo.models.gguf_file import GGUFFile, GGUFTensor
from octavo.ops.linear import QuantizedWeight

_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "attn_norm": ["attn_norm"],
    "attn.qkv_proj": ["attn_q", "attn_k", "attn_v"],
    "attn.q_norm": ["attn_q_norm"],
    "attn.k_norm": ["attn_k_norm"],
    "attn.o_proj": ["attn_output"],
    "attn_out_norm": ["post_attention_norm"],
    "mlp_norm": ["ffn_norm"],
    "mlp.gate_up_proj": ["ffn_gate", "ffn_up"],
    "mlp.down_proj": ["ffn_down"],
    "mlp_out_norm": ["post_ffw_norm"],
}
_NOT_WEIGHTS = {"rope_freqs.weight"}  # read into the config


class GGUFWeights:
    """`WeightSource` of a GGUF file.

    llama.cpp's converter stores Llama's q and k rows with the two halves of a head interleaved, for a rotation of
    neighbours; they are put back in order here, row by row and still quantised. It stores Gemma's norms as 1 + w; ours
    hold w.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._tensors = {name: tensor for name, tensor in file.tensors.items() if name not in _NOT_WEIGHTS}
        architecture = file.metadata["general.architecture"]
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if architecture == "llama" else {}
        self._norm_offset = 1.0 if architecture == "gemma3" else 0.0

    def names(self) -> set[str]:
        return set(self._tensors)

    def parts(self, parameter: str) -> list[str]:
        module, _, suffix = parameter.rpartition(".")
        if module in _TOP:
            return [f"{_TOP[module]}.{suffix}"]
        _, index, inner = module.split(".", 2)
        return [f"blk.{index}.{part}.{suffix}" for part in _IN_LAYER[inner]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def kind(self, name: str) -> str:
        return self._tensors[name].type.name

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self._tensors[name]
        # the bytes travel quantised; a GPU unpacks them itself
        values = dequantize(torch.from_numpy(self._rows(tensor)).to(device), tensor.type, torch.float32)
        if self._norm_offset and name.endswith("norm.weight"):
            values = values - self._norm_offset
        return values.view(tensor.shape).to(dtype)

    def quantized(self, names: Sequence[str]) -> QuantizedWeight | None:
        tensors = [self._tensors[name] for name in names]
        kinds = {tensor.type.name for tensor in tensors}
        if len(kinds) > 1 or not kinds <= QuantizedWeight.QTYPES or any(len(tensor.shape) != 2 for tensor in tensors):
            return None
        rows = [self._rows(tensor) for tensor in tensors]
        shape = (sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1])
        return QuantizedWeight.from_gguf(rows[0] if len(rows) == 1 else np.concatenate(rows), kinds.pop(), shape)

    def _rows(self, tensor: GGUFTensor) -> np.ndarray:
        """Raw bytes, a row per output feature (or element of a vector), in the order of Hugging Face's checkpoints."""
        rows = tensor.data.reshape(tensor.shape[0], -1) if len(tensor.shape) == 1 else tensor.data
        heads = self._heads.get(tensor.name.split(".")[-2])
        if heads is None:
            return rows
        return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
