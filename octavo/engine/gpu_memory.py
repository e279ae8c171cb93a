"""What a GPU's memory is used for: measured before the cache takes the rest, and told exactly afterwards.

How much a step needs beside weights and cache depends on the model, the kernels, the library's workspaces and the
graphs; so the largest step is run once over a small cache, and what the driver says is gone is what it takes. Other
kinds of steps follow it, so that their kernels are compiled before a request waits for them.
"""

import gc
from dataclasses import asdict, dataclass, replace

import torch

from octavo.engine.config import EngineConfig
from octavo.engine.decode_graphs import DecodeGraphs
from octavo.engine.kv_cache import PagedKVCache
from octavo.engine.model_runner import ModelRunner
from octavo.engine.request import Request
from octavo.engine.sampler import Sampler
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.models.causal_lm import CausalLM

PARTS = ("weights", "kv_cache", "steps", "allocator", "outside", "free")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one GPU, all of them.

    weights, kv_cache: tensors. steps: other live tensors, the graphs' included. allocator: held by torch's allocator
    for the next step's tensors. outside: everything else that is in use: CUDA's context, kernels, graphs' launch data,
    libraries' workspaces, other processes. free: the rest.
    """

    total: int
    weights: int
    kv_cache: int
    steps: int
    allocator: int
    outside: int
    free: int

    def __post_init__(self) -> None:
        assert sum(getattr(self, part) for part in PARTS) == self.total, f"the parts do not sum to the GPU: {self}"

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [(part, getattr(self, part)) for part in PARTS]
        lines = [f"  {part:<10}{size:>20,}{size / self.total:>9.2%}" for part, size in parts]
        return "\n".join([f"GPU memory{self.total:>22,} bytes", *lines])


def device_memory(device: torch.device, weights: int, kv_cache: int) -> DeviceMemory:
    """The GPU's memory now, given the bytes of two of its parts."""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return DeviceMemory(
        total=total,
        weights=weights,
        kv_cache=kv_cache,
        steps=allocated - weights - kv_cache,
        allocator=reserved - allocated,
        outside=total - free - reserved,
        free=free,
    )


@torch.inference_mode()
def measure_step_memory(model: CausalLM, config: EngineConfig, *, cuda_graphs: bool) -> int:
    """Bytes that steps of this config will take beside weights and cache, those of all graphs included. Takes a second
    or two, of which the first real steps are spared most: kernels are compiled and libraries loaded."""
    device = model.device
    num_seqs, most = config.max_num_seqs, config.max_num_batched_tokens
    length = min(most // num_seqs, config.max_model_len - 1)
    blocks = max(num_seqs * -(-(length + 1) // config.block_size), -(-config.max_model_len // config.block_size))
    config = replace(config, num_blocks=blocks, enable_prefix_caching=False)
    _release()
    before = torch.cuda.memory_reserved(device)
    cache = PagedKVCache(model, config.num_blocks, config.block_size, model.dtype, device)
    bounds = {"max_num_seqs": num_seqs, "max_model_len": config.max_model_len}
    graphs = DecodeGraphs(model, cache, **bounds, record=False)
    runner = ModelRunner(model, cache, Sampler(model.config.vocab_size, device), **bounds, decode_graphs=graphs)
    scheduler = Scheduler(config)
    for i in range(num_seqs):
        scheduler.add_request(Request(str(i), [0] * length, SamplingParams(max_tokens=1, ignore_eos=True)))
    _run(runner, scheduler)
    _run_mixed_steps(runner, scheduler)
    taken = torch.cuda.memory_reserved(device) - before - cache.nbytes
    if cuda_graphs:
        pool, launch_data = min(_memory_of_a_graph(graphs, device) for _ in range(2))  # another process may disturb one
        taken += pool + launch_data * len(graphs.sizes)  # the smaller graphs' tensors fit into the largest one's pool
    del cache, graphs, runner
    _release()
    return taken


def _run(runner: ModelRunner, scheduler: Scheduler) -> None:
    while scheduler.has_unfinished():
        _step(runner, scheduler)


def _step(runner: ModelRunner, scheduler: Scheduler) -> None:
    output = scheduler.schedule()
    scheduler.update(output, runner.execute(output))


def _run_mixed_steps(runner: ModelRunner, scheduler: Scheduler) -> None:
    """A prompt alone, then a short one and several beside the tokens that follow it, and draws that truncate: other
    kernels each."""
    params = SamplingParams(max_tokens=6, top_p=0.9, ignore_eos=True)
    for step, lengths in enumerate([[600], [60], [600] * 4]):
        for i, length in enumerate(lengths):
            prompt = [0] * max(1, min(length, scheduler.config.max_model_len - 8))
            scheduler.add_request(Request(f"{step} {i}", prompt, params))
        _step(runner, scheduler)
    _run(runner, scheduler)


def _memory_of_a_graph(graphs: DecodeGraphs, device: torch.device) -> tuple[int, int]:
    """Bytes of the largest graph: in torch's allocator, and outside of it."""
    graphs.drop()
    _release()
    before = device_memory(device, 0, 0)
    graphs.record(graphs.sizes[-1:])
    _release()
    after = device_memory(device, 0, 0)
    pool = after.steps + after.allocator - before.steps - before.allocator
    return max(pool, 0), max(after.outside - before.outside, 0)


def _release() -> None:
    """Gives what torch's allocator holds and nobody uses back to the driver."""
    gc.collect()
    torch.cuda.empty_cache()
