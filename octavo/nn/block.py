"""The transformer block: attention and MLP, each wired into the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from octavo.nn.cache import LayerKVCache, LayerLatentCache
from octavo.nn.norm import RMSNorm
from octavo.nn.residual import wire
from octavo.nn.rotary import Rotation
from octavo.ops.metadata import AttentionMetadata


class TransformerBlock(nn.Module):
    """x → wired attention → wired MLP.

    attention: `MultiHeadAttention` or `MultiHeadLatentAttention`. wiring: a name of `octavo.nn.wire` ("pre", "post",
    "branch", "rezero", "layerscale", or several, as in "pre+branch"). norm: builds a norm from its width `dim`.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        wiring: str = "pre",
        norm: Callable[[int], nn.Module] = RMSNorm,
    ) -> None:
        super().__init__()
        self.attention = wire(wiring, attention, dim, norm)
        self.mlp = wire(wiring, mlp, dim, norm)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        kv_cache: LayerKVCache | LayerLatentCache | None = None,
        metadata: AttentionMetadata | None = None,
        *,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """x (B, S, dim) without a cache, (T, dim) with one; the other arguments go to the attention."""
        x = self.attention(x, positions, kv_cache, metadata, rotation=rotation)
        out: Tensor = self.mlp(x)
        return out
