"""Programmatic dependent launch (sm_90 on): a kernel starts while the one before it ends.

A decode step is hundreds of kernels of 2 to 6 µs, of which a normal launch loses one or more to draining and filling
the GPU. A kernel launched with `early_launch_options` may run before its predecessor is done, so it calls `gdc_wait`
before it touches anything that another kernel writes or reads. `gdc_wait` returns when all earlier kernels are done and
their writes are seen. Then `gdc_launch_dependents` lets the next kernel come in.

Weights may be loaded before the wait (`linear_small_batch` does): whoever changes a weight in place must not make a
product with it the very next kernel. An optimiser's step is always followed by other kernels, such as an embedding's.
"""

import functools

import torch


@functools.cache
def early_launch_options(device: torch.device) -> dict[str, bool]:
    """Launch options for a kernel with a constexpr PDL, True where the device can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
