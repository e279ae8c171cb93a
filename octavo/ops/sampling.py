"""Draws the next tokens of a batch with per-row parameters, on a GPU in one launch without a host read."""

from typing import cast

from octavo.kernels.reference.sampling import sample_on_device as reference
from octavo.kernels.spec import Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape


def sample_on_device(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    truncates: bool = True,
) -> Tensor:
    """(N,) int64 tokens of logits (N, V), which are not changed.

    In this order: temperature (N,) fp32 (under 1e-5: the largest logit, the lowest token among equals), min_p (N,)
    fp32, top_k (N,) int32 (0 or less: all), top_p (N,) fp32 (the shortest run of the likeliest whose renormalised
    probability reaches it). Entries equal to the last one kept are all kept. The draw depends on seeds (N,) int64,
    positions (N,) int64 (tokens drawn before) and the row alone, not on its place in the batch. truncates=False: the
    caller knows that no row has a top_k, top_p or min_p, which saves launches.

    Sources: Holtzman et al. 2020 (nucleus); Gumbel-max (Maddison et al. 2014).
    """
    check_shape("logits", logits, ("N", "V"))
    rows = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, x in {**rows, "seeds": seeds, "positions": positions}.items():
        check_shape(name, x, (logits.shape[0],))
    arguments = (logits, temperature, top_k, top_p, min_p, seeds, positions, truncates)
    return cast(Tensor, inference.run("sample_on_device", reference, arguments))
