"""The ops as torch sees them: `torch.library` custom ops with fakes and autograd, around the chosen kernel.

Under `torch.compile` and `torch.export`, and where a gradient is wanted, a call goes through the custom op; otherwise
straight to the kernel, because a custom op costs about 20 µs in eager mode and a decode step makes dozens of calls.
The reference backend is plain torch and is called as such, so that it can be differentiated twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch._library.custom_ops import CustomOpDef

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Gradients, Tensor
from octavo.ops import dispatch

_TENSOR_OPTIONS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "block_table",
    "qv",
    "alibi_slopes",
    "learnable_sink",
    "attn_bias",
    "k_scale",
    "v_scale",
)
_DIFFERENTIABLE_OPTIONS = ("qv", "learnable_sink", "attn_bias")
_OPTIONS_SCHEMA = (
    ", ".join(f"Tensor? {name}" for name in _TENSOR_OPTIONS)
    + ", Tensor? dropout_seed, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, SymInt window_left, "
    "SymInt window_right, float softcap, float dropout_p, bool deterministic, str? backend"
)
_NUM_OPTIONS = _OPTIONS_SCHEMA.count(",") + 1


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)`, differentiable in q, k, v, qv, learnable_sink and attn_bias."""
    backend = dispatch.forced_backend(backend)
    plain = backend == "reference" or not _wants_grad(q, k, v, t.qv, t.learnable_sink, t.attn_bias)
    if plain and not _traced(q):
        return _flash_fwd(q, k, v, spec, _with_seed(t, dropout_seed), backend)
    return cast(tuple[Tensor, Tensor], _flash_fwd_op(q, k, v, *_flatten(spec, t, dropout_seed, backend)))


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dropout_seed: Tensor | None = None,
) -> Sequence[Tensor]:
    """`Gradients` of `flash_attention`, for callers that call it themselves; those not computed are empty."""
    options = _flatten(spec, t, dropout_seed, dispatch.forced_backend())
    arguments = (dout, None, q, k, v, out, softmax_lse, spec.wants_dbias, *options)
    return cast(Sequence[Tensor], (_flash_bwd_op if _traced(q) else _flash_bwd)(*arguments))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    num_splits: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out (T, Hq, Dv), softmax_lse (Hq, T))` over pages; asking its gradient is an error."""
    if _traced(q) or _wants_grad(q, k_cache, v_cache, t.qv, t.learnable_sink):
        options = _flatten(spec, t, None, dispatch.forced_backend(backend))
        return cast(tuple[Tensor, Tensor], _paged_attention_op(q, k_cache, v_cache, num_splits, *options))
    arguments = (q, k_cache, v_cache, spec, t, num_splits)
    return cast(tuple[Tensor, Tensor], dispatch.run("paged_attention", q.device, arguments, backend))


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    head_dim_v: int,
    spec: AttentionSpec,
    t: AttentionTensors,
    num_splits: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out (T, Hq, head_dim_v), softmax_lse (Hq, T))` over pages of latents; asking its gradient is an error."""
    if _traced(q) or _wants_grad(q, kv_cache):
        options = _flatten(spec, t, None, dispatch.forced_backend(backend))
        return cast(tuple[Tensor, Tensor], _mla_decode_op(q, kv_cache, head_dim_v, num_splits, *options))
    arguments = (q, kv_cache, head_dim_v, spec, t, num_splits)
    return cast(tuple[Tensor, Tensor], dispatch.run("mla_decode", q.device, arguments, backend))


def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes k and v into the caches, in place and without gradient."""
    arguments = (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if _traced(k):
        _store_kv_cache_op(*arguments)
    else:
        with torch.no_grad():
            dispatch.run("store_kv_cache", k.device, arguments)


def store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes latents into the cache, in place and without gradient."""
    if _traced(latent):
        _store_latent_cache_op(latent, kv_cache, slot_mapping)
    else:
        with torch.no_grad():
            dispatch.run("store_latent_cache", latent.device, (latent, kv_cache, slot_mapping))


def _traced(x: Tensor) -> bool:
    """True where a graph is being recorded, or x is no plain tensor (fake, functional, distributed)."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _with_seed(t: AttentionTensors, dropout_seed: Tensor | None) -> AttentionTensors:
    return t if dropout_seed is None else replace(t, dropout_seed=int(dropout_seed))


def _flatten(
    spec: AttentionSpec, t: AttentionTensors, dropout_seed: Tensor | None, backend: str | None
) -> tuple[Any, ...]:
    """The options in the order of `_OPTIONS_SCHEMA`."""
    return (
        *(getattr(t, name) for name in _TENSOR_OPTIONS),
        dropout_seed,
        t.max_seqlen_q,
        t.max_seqlen_k,
        spec.softmax_scale,
        spec.window_left,
        spec.window_right,
        spec.softcap,
        spec.dropout_p,
        spec.deterministic,
        backend,
    )


def _unflatten(options: Sequence[Any]) -> tuple[AttentionSpec, AttentionTensors, str | None]:
    tensors = dict(zip(_TENSOR_OPTIONS, options, strict=False))
    dropout_seed, max_seqlen_q, max_seqlen_k, *scalars, backend = options[len(_TENSOR_OPTIONS) :]
    t = AttentionTensors(**tensors, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return AttentionSpec(*scalars), _with_seed(t, dropout_seed), backend


def _flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors, backend: str | None
) -> tuple[Tensor, Tensor]:
    out, softmax_lse = dispatch.run("flash_fwd", q.device, (q, k, v, spec, t), backend)
    return out.contiguous(), softmax_lse.contiguous()


def _empty_out(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """The fake result of any forward: out, and the LSE (B, Hq, S) or (Hq, T)."""
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:-1], head_dim_v), q.new_empty(lse_shape, dtype=lse_dtype)


def _op(name: str, arguments: str, num_outputs: int) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A custom op of these arguments and the options, which its Python signature takes as a list."""
    schema = f"({arguments}, {_OPTIONS_SCHEMA}) -> ({', '.join(['Tensor'] * num_outputs)})"

    def register(implementation: Callable[..., Any]) -> CustomOpDef:
        return torch.library.custom_op(f"octavo::{name}", implementation, mutates_args=(), schema=schema)

    return register


@_op("flash_fwd", "Tensor q, Tensor k, Tensor v", num_outputs=2)
def _flash_fwd_op(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _flash_fwd(q, k, v, *_unflatten(options))


@_flash_fwd_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v.shape[-1])


def _flash_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    wants_dbias: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    spec, t, backend = _unflatten(options)
    arguments = (dout, q, k, v, out, softmax_lse, replace(spec, wants_dbias=wants_dbias), t, dlse)
    gradients: Gradients = dispatch.run("flash_bwd", q.device, arguments, backend)
    # a custom op returns no None
    return tuple(q.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


_flash_bwd_op = _op(
    "flash_bwd",
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, bool wants_dbias",
    num_outputs=6,
)(_flash_bwd)


@_flash_bwd_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    wants_dbias: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    _, t, _ = _unflatten([*options[: len(_TENSOR_OPTIONS)], None, *options[len(_TENSOR_OPTIONS) + 1 :]])
    inputs = (q, k, v, t.qv, t.learnable_sink, t.attn_bias if wants_dbias else None)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = inputs[: 3 + len(_TENSOR_OPTIONS) + 1]
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = inputs[len(tensors) : -1]
    # the backward may run on another thread, which does not see this one's `use_backend`
    ctx.backend = dispatch.forced_backend(inputs[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, softmax_lse = ctx.saved_tensors
    q, k, v, *options = tensors
    if dout is None:
        dout = torch.zeros_like(out)
    wants_dbias = ctx.needs_input_grad[3 + _TENSOR_OPTIONS.index("attn_bias")]
    *gradients, dqv, dsink, dbias = _flash_bwd_op(
        dout, dlse, q, k, v, out, softmax_lse, wants_dbias, *options, *ctx.scalars, ctx.backend
    )
    of_option = dict(zip(_DIFFERENTIABLE_OPTIONS, (dqv, dsink, dbias if wants_dbias else None), strict=True))
    wanted = {name: x for name, x in zip(_TENSOR_OPTIONS, options, strict=False) if x is not None}
    rest = [of_option.get(name) if name in wanted else None for name in _TENSOR_OPTIONS]
    return (*gradients, *rest, *[None] * (_NUM_OPTIONS - len(_TENSOR_OPTIONS)))


def _no_second_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "flash attention has no double backward outside the reference; wrap the forward in "
        "`with octavo.use_backend('reference'):` to differentiate it twice"
    )


def _no_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "attention over a paged or in-place cache has no backward; wrap inference in torch.no_grad(), and train with "
        "flash_attn_func or flash_attn_varlen_func"
    )


_flash_fwd_op.register_autograd(_backward, setup_context=_save_for_backward)
_flash_bwd_op.register_autograd(_no_second_backward)


@_op("paged_attention", "Tensor q, Tensor k_cache, Tensor v_cache, SymInt num_splits", num_outputs=2)
def _paged_attention_op(q: Tensor, k_cache: Tensor, v_cache: Tensor, num_splits: int, *options: Any) -> tuple[Any, ...]:
    spec, t, backend = _unflatten(options)
    results = dispatch.run("paged_attention", q.device, (q, k_cache, v_cache, spec, t, num_splits), backend)
    return tuple(x.contiguous() for x in results)


@_paged_attention_op.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, num_splits: int, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v_cache.shape[-1])


@_op("mla_decode", "Tensor q, Tensor kv_cache, SymInt head_dim_v, SymInt num_splits", num_outputs=2)
def _mla_decode_op(q: Tensor, kv_cache: Tensor, head_dim_v: int, num_splits: int, *options: Any) -> tuple[Any, ...]:
    spec, t, backend = _unflatten(options)
    results = dispatch.run("mla_decode", q.device, (q, kv_cache, head_dim_v, spec, t, num_splits), backend)
    return tuple(x.contiguous() for x in results)


@_mla_decode_op.register_fake
def _(q: Tensor, kv_cache: Tensor, head_dim_v: int, num_splits: int, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_out(q, head_dim_v)


_paged_attention_op.register_autograd(_no_backward)
_mla_decode_op.register_autograd(_no_backward)


@torch.library.custom_op("octavo::store_kv_cache", mutates_args=("k_cache", "v_cache"))
def _store_kv_cache_op(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    dispatch.run("store_kv_cache", k.device, (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale))


@torch.library.custom_op("octavo::store_latent_cache", mutates_args=("kv_cache",))
def _store_latent_cache_op(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    dispatch.run("store_latent_cache", latent.device, (latent, kv_cache, slot_mapping))


@_store_kv_cache_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    return None


@_store_latent_cache_op.register_fake
def _(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    return None
