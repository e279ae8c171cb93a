"""Checks of arguments that several ops share; each names the argument, what was expected and what was got."""

import torch

from octavo.kernels.spec import AttentionSpec, Tensor


def check_shape(name: str, x: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise `ValueError` unless x has these axes; a string stands for any size."""
    shape = x.shape
    if len(shape) == len(expected):
        for size, wanted in zip(shape, expected, strict=True):  # a generator in all() would cost twice as much
            if size != wanted and not isinstance(wanted, str):
                break
        else:
            return
    raise ValueError(f"{name}: expected shape ({', '.join(map(str, expected))}), got {tuple(shape)}")


def check_index(name: str, x: Tensor, expected: tuple[int | str, ...], device: torch.device) -> None:
    """Raise `ValueError` unless x is an int32 tensor of this shape on the device of the data."""
    check_shape(name, x, expected)
    if x.dtype != torch.int32:
        raise ValueError(f"{name}: expected dtype torch.int32, got {x.dtype}; convert it with .to(torch.int32)")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} as q, got {x.device}")


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    """Raise `ValueError` unless x has q's dtype and device."""
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raise `ValueError` unless each key/value head serves a whole number of query heads."""
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"k: expected a number of heads that divides q's {q_heads}, got {kv_heads}")


def check_capacity(name: str, num_keys: Tensor, capacity: int) -> None:
    """Raise `ValueError` where a row has more keys than its pages hold; on a CPU alone, where looking costs nothing."""
    if num_keys.device.type != "cpu" or torch.compiler.is_compiling() or num_keys.numel() == 0:
        return
    longest = int(num_keys.max())
    if longest > capacity:
        raise ValueError(
            f"{name}: expected at most {capacity} keys per row, got {longest}; "
            "make the cache longer or the block_table wider"
        )


def check_floating(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless x has a dtype that attention computes in."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def check_broadcast(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless x is a float tensor that broadcasts to `shape`."""
    sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    if len(sizes) != len(shape) or any(size not in (1, wide) for size, wide in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a float tensor, got {x.dtype}; turn a mask into 0 and -inf first")


def check_score_options(q: Tensor, batch: int, alibi_slopes: Tensor | None, learnable_sink: Tensor | None) -> None:
    """Raise `ValueError` unless the per-head options fit q's heads."""
    num_heads = q.shape[-2]
    if alibi_slopes is not None:
        check_shape("alibi_slopes", alibi_slopes, (num_heads,) if alibi_slopes.dim() == 1 else (batch, num_heads))
        if alibi_slopes.dtype != torch.float32:
            raise ValueError(f"alibi_slopes: expected dtype torch.float32, got {alibi_slopes.dtype}")
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes: expected no requires_grad, there is no gradient for it; use attn_bias")
    if learnable_sink is not None:
        check_shape("learnable_sink", learnable_sink, (num_heads,))


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on; the cast carries its own gradient."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def make_spec(
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> AttentionSpec:
    """The scalar options in one value; `causal` closes the window's right side, the scale defaults to 1/√head_dim."""
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {window_size!r}")
    left, right = (-1 if side is None or side < 0 else int(side) for side in window_size)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if softcap < 0.0:
        raise ValueError(f"softcap: expected 0 (off) or a positive cap, got {softcap}")
    return AttentionSpec(
        softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=0 if causal else right,
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        deterministic=deterministic,
    )
