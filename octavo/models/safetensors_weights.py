"""A directory of safetensors files as a source of weights, with Hugging Face's names.

Files are mapped, not read: a tensor's bytes come from disk when it is cast or copied. The `safetensors` package checks
every offset and size against the file; a `*.index.json` may name files of its own directory only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.models.config import ModelConfig, read_json
from octavo.ops.linear import QuantizedWeight

_TOP = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_IN_LAYER = {
    "attn_norm": ["input_layernorm"],
    "attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.o_proj": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
_SANDWICH = {  # with norms on both sides, Hugging Face's post_attention_layernorm is the one after attention
    "attn_out_norm": ["post_attention_layernorm"],
    "mlp_norm": ["pre_feedforward_layernorm"],
    "mlp_out_norm": ["post_feedforward_layernorm"],
}
_DTYPES = {"F64", "F32", "F16", "BF16"}
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.")


class SafetensorsWeights:
    """`WeightSource` of a directory with model.safetensors, or with shards and model.safetensors.index.json."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        sandwich = config.architecture == "Gemma3ForCausalLM"
        self._in_layer = _IN_LAYER | (_SANDWICH if sandwich else {})
        self._files: dict[str, tuple[Any, str]] = {}  # our spelling → (open file, the file's spelling)
        for path in _shards(directory):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
            for stored in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118, it is no mapping
                name = stored.replace("language_model.", "", 1)
                if not name.removeprefix("model.").startswith(_OTHER_TOWERS) and not name.endswith(
                    "rotary_emb.inv_freq"
                ):
                    self._files[name] = (file, stored)

    def names(self) -> set[str]:
        return set(self._files)

    def parts(self, parameter: str) -> list[str]:
        module, _, suffix = parameter.rpartition(".")
        if module in _TOP:
            return [f"{_TOP[module]}.{suffix}"]
        _, index, inner = module.split(".", 2)
        return [f"model.layers.{index}.{part}.{suffix}" for part in self._in_layer[inner]]

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._files[name]
        return tuple(file.get_slice(stored).get_shape())

    def kind(self, name: str) -> str:
        file, stored = self._files[name]
        return str(file.get_slice(stored).get_dtype())

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.kind(name) not in _DTYPES:
            raise ValueError(f"{name} is stored as {self.kind(name)}; {', '.join(sorted(_DTYPES))} are read")
        file, stored = self._files[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor.to(device=device, dtype=dtype)

    def quantized(self, names: Sequence[str]) -> QuantizedWeight | None:
        return None


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ValueError(
                f"{directory} holds neither model.safetensors nor {index.name}; other formats are not read"
            )
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"weight_map of {index} must be an object from tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"weight_map of {index} names {name!r}; only .safetensors files beside it are read")
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing, though {index.name} names it; is the download complete?")
    return [directory / name for name in names]
