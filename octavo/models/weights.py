"""Fills a model's parameters from a checkpoint, whatever its format: merges, casts, checks, and keeps quantised what
can be.

A format is a `WeightSource`: it knows which of its tensors make one of our parameters (three for a merged qkv_proj, two
for gate_up_proj) and reads them. Shapes are compared before anything is read, and every tensor of the file must find
its place.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from octavo.models.causal_lm import CausalLM, TokenEmbedding
from octavo.nn import Linear
from octavo.ops.linear import QuantizedWeight


class WeightSource(Protocol):
    """One checkpoint, opened."""

    def names(self) -> set[str]:
        """The checkpoint's tensors that a decoder must use."""
        ...

    def parts(self, parameter: str) -> list[str]:
        """The checkpoint's names of the tensors that, stacked along their rows, make our `parameter`."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str:
        """The stored type, for the report: "BF16", "Q4_1", …"""
        ...

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def quantized(self, names: Sequence[str]) -> QuantizedWeight | None:
        """The stacked tensors as they are stored, or None when no quantised weight can hold them."""
        ...


def load_weights(
    model: CausalLM,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_quantized: bool,
    progress: bool = True,
) -> Counter[str]:
    """Assign every parameter of `model`, built on the meta device. Returns parameters by how they are held.

    Raises `ValueError` when a tensor is missing, has another shape than the config asks for, or is left over.
    """
    parameters = dict(model.named_parameters())  # a tied lm_head stands in it once, as the embedding
    sources = {name: source.parts(name) for name in parameters}
    for name, parts in sources.items():
        _check_shapes(name, parameters[name], parts, source)
    left_over = source.names() - {part for parts in sources.values() for part in parts}
    if model.config.tie_word_embeddings:
        left_over -= set(source.parts("lm_head.weight"))
    if left_over:
        examples = ", ".join(sorted(left_over)[:3])
        raise ValueError(
            f"the checkpoint holds {len(left_over)} tensors that {type(model).__name__} lacks: {examples}, …"
        )
    held: Counter[str] = Counter()
    for name, parts in tqdm(sources.items(), "Loading weights", disable=not progress, delay=1.0, leave=False):
        module = model.get_submodule(name.rpartition(".")[0])
        weight = source.quantized(parts) if keep_quantized and isinstance(module, Linear | TokenEmbedding) else None
        kinds = "/".join(dict.fromkeys(source.kind(part) for part in parts))
        if weight is not None:
            _set_quantized(module, weight, dtype)
            held[f"{kinds}, kept quantised"] += parameters[name].numel()
        else:
            target = parameters[name]  # on the meta device, in the dtype that it is to have
            dense = [source.dense(part, target.dtype, device) for part in parts]
            tensor = dense[0] if len(dense) == 1 else torch.cat(dense)
            parameter = nn.Parameter(tensor.view(target.shape), requires_grad=target.requires_grad)
            setattr(module, name.rpartition(".")[2], parameter)
            held[f"{kinds} as {str(target.dtype).removeprefix('torch.')}"] += target.numel()
    if model.config.tie_word_embeddings:
        _tie(model)
    return held


def _check_shapes(name: str, parameter: Tensor, parts: list[str], source: WeightSource) -> None:
    missing = [part for part in parts if part not in source.names()]
    if missing:
        raise ValueError(f"the checkpoint lacks {missing[0]!r}, which {name} needs")
    shapes = [source.shape(part) for part in parts]
    rows = parameter.flatten(0, -2) if parameter.ndim > 2 else parameter  # experts' matrices stand one below the other
    stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if stacked != tuple(rows.shape) or len({shape[1:] for shape in shapes}) != 1:
        found = ", ".join(f"{part} {shape}" for part, shape in zip(parts, shapes, strict=True))
        raise ValueError(f"{name} must have the shape {tuple(parameter.shape)}, the checkpoint has {found}")


def _set_quantized(module: nn.Module, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    if isinstance(module, TokenEmbedding):
        module.set_quantized_weight(weight, dtype)
    else:
        assert isinstance(module, Linear)
        module.set_quantized_weight(weight)


def _tie(model: CausalLM) -> None:
    weight = model.embed_tokens.weight
    if isinstance(weight, QuantizedWeight):
        model.lm_head.set_quantized_weight(weight)
    else:
        model.lm_head.weight = weight
