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
_MLA = {
    "attn.q_proj": ["self_attn.q_proj"],
    "attn.q_proj_down": ["self_attn.q_a_proj"],
    "attn.q_norm": ["self_attn.q_a_layernorm"],
    "attn.q_proj_up": ["self_attn.q_b_proj"],
    "attn.kv_proj": ["self_attn.kv_a_proj_with_mqa"],
    "attn.kv_norm": ["self_attn.kv_a_layernorm"],
    "attn.kv_proj_up": ["self_attn.kv_b_proj"],
}
_DTYPES = {"F64", "F32", "F16", "BF16"}
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.")


class SafetensorsWeights:
    """`WeightSource` of a directory with model.safetensors, or with shards and model.safetensors.index.json."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        sandwich = config.architecture == "Gemma3ForCausalLM"
        self._in_layer = _IN_LAYER | (_SANDWICH if sandwich else {}) | (_MLA if config.mla else {}) | _experts(config)
        self._files: dict[str, tuple[Any, str]] = {}  # our spelling → (open file, the file's spelling)
        for path in _shards(directory):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
            for stored in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118, it is no mapping
                name = stored.replace("language_model.", "", 1)
                if not _is_unused(name, config):
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


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint's tensor belongs to something that a decoder does not compute."""
    if name.removeprefix("model.").startswith(_OTHER_TOWERS) or name.endswith("rotary_emb.inv_freq"):
        return True
    if config.architecture != "DeepseekV3ForCausalLM" or not name.startswith("model.layers."):
        return False
    index = name.split(".")[2]  # multi-token prediction is stored as layers after the last
    return index.isdecimal() and int(index) >= config.num_layers


def _experts(config: ModelConfig) -> dict[str, list[str]]:
    """The parts of a mixture of experts, each expert's matrices one below the other."""
    if config.moe is None:
        return {}
    each = range(config.moe.num_experts)
    return {
        "mlp.router": ["mlp.gate"],
        "mlp.experts.gate_up_proj": [f"mlp.experts.{i}.{part}" for i in each for part in ("gate_proj", "up_proj")],
        "mlp.experts.down_proj": [f"mlp.experts.{i}.down_proj" for i in each],
        "mlp.shared_experts.gate_up_proj": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
        "mlp.shared_experts.down_proj": ["mlp.shared_experts.down_proj"],
    }


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
