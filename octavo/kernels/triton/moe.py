"""Experts on the GPU without a host read: choice, sorting by expert, grouped matrix products, weighted sum.

A *pair* is one (token, expert) choice, numbered token · k + place. Few pairs: each is a matrix-vector product of its
own, so nothing is sorted and every needed weight is read once. Many: `sort_kernel` lists the pairs by expert, and each
program of the grouped products finds its tile in the experts' offsets, so the grid depends on shapes only and a CUDA
graph can replay it for other choices. Sums are in a fixed order: same input, same bits.

Two sorts of tile serve the grouped products: small ones, as fast as the weights can be read, where the experts in use
have few rows each; large ones, as fast as can be multiplied, where they have many. 256 tokens may be either, by how the
router spreads them, which only the device knows: then both are launched, and the programs of the wrong one leave.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Routing, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.gated_activation import activate, gated_activation
from octavo.kernels.triton.launch import Constants, ceil_div, launch_by_arguments, next_power_of_2


@triton.jit
def _best(scores, index):
    """(largest entry, its index), the lowest index among equals, as torch.topk's order is undefined there."""
    top = tl.max(scores, 0)
    return top, tl.min(tl.where(scores == top, index, 1 << 30), 0)


@triton.jit(do_not_specialize=["scaling"])
def route_kernel(
    logits, bias, weights, experts, scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, NORMALISE: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token: its scores, the best groups, the TOP_K best experts within them and their weights."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    used = e < NUM_EXPERTS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits + token * NUM_EXPERTS + e, mask=used, other=float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(tl.maximum(x, -80.0))
    else:
        x = tl.exp(x - tl.max(x, 0))
        scores = x / tl.sum(x, 0)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + e, mask=used, other=0.0)
    choice = tl.where(used, choice, float("-inf"))
    if NUM_GROUPS > 1:
        group = e // (NUM_EXPERTS // NUM_GROUPS)
        g = tl.arange(0, BLOCK_G)
        of_group = (group[None, :] == g[:, None]) & used[None, :]
        in_group = tl.where(of_group, choice[None, :], float("-inf"))
        value = tl.max(in_group, 1)
        if bias is not None:  # a group counts as its two best experts
            first = tl.min(tl.where(in_group == value[:, None], e[None, :], 1 << 30), 1)
            second = tl.max(tl.where(e[None, :] == first[:, None], float("-inf"), in_group), 1)
            value += second
        value = tl.where(g < NUM_GROUPS, value, float("-inf"))
        is_open = tl.zeros((BLOCK_G,), tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            _, best = _best(value, g)
            is_open = tl.where(g == best, 1, is_open)
            value = tl.where(g == best, float("-inf"), value)
        seen = tl.sum(of_group.to(tl.int32) * is_open[:, None], 0) > 0
        choice = tl.where(seen, choice, float("-inf"))
    place = tl.arange(0, BLOCK_K)
    picked = tl.zeros((BLOCK_K,), tl.int32)
    weight = tl.zeros((BLOCK_K,), tl.float32)
    for j in tl.static_range(TOP_K):
        _, best = _best(choice, e)
        best = tl.minimum(best, NUM_EXPERTS - 1)  # of NaN none is the largest: an expert's number all the same
        picked = tl.where(place == j, best, picked)
        weight = tl.where(place == j, tl.sum(tl.where(e == best, scores, 0.0), 0), weight)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALISE:
        weight /= tl.maximum(tl.sum(weight, 0), 1e-20)
    to = token * TOP_K + place
    tl.store(weights + to, weight * scaling, mask=place < TOP_K)
    tl.store(experts + to, picked.to(experts.dtype.element_ty), mask=place < TOP_K)


@triton.jit(do_not_specialize=["pairs"])
def sort_kernel(experts, order, offsets, pairs, NUM_EXPERTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """One expert: where its pairs begin, and their numbers in order. offsets (NUM_EXPERTS + 1,), order (pairs,)."""
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    before = tl.zeros((BLOCK,), tl.int32)
    for p0 in range(0, pairs, BLOCK):
        chosen = tl.load(experts + p0 + i, mask=p0 + i < pairs, other=NUM_EXPERTS)
        before += (chosen < e).to(tl.int32)
    base = tl.sum(before, 0)
    tl.store(offsets + e, base)
    if e == NUM_EXPERTS - 1:
        tl.store(offsets + NUM_EXPERTS, pairs)
    for p0 in range(0, pairs, BLOCK):
        mine = (tl.load(experts + p0 + i, mask=p0 + i < pairs, other=NUM_EXPERTS) == e).to(tl.int32)
        to = base + tl.cumsum(mine, 0) - mine
        tl.store(order + to, p0 + i, mask=mine > 0)
        base += tl.sum(mine, 0)


@triton.jit
def _place(max_tiles, columns, GROUP: tl.constexpr):
    """(tile, column) of this program: all columns of GROUP tiles, then those of the next, so that what runs at a time
    finds its rows and weights in the L2 cache."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(max_tiles - first, GROUP)
    place = program % (GROUP * columns)
    return first + place % size, place // size


@triton.jit
def _find_tile(
    tile, offsets, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, ONLY: tl.constexpr,
    FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """(expert, first row, end of rows) of the tile; expert == NUM_EXPERTS when there is no such tile. ONLY "few", or
    "many": nor is there any unless the experts in use have at most FEW_ROWS each on average, or more."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + e, mask=e < NUM_EXPERTS, other=0)
    end = tl.load(offsets + e + 1, mask=e < NUM_EXPERTS, other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    if ONLY is not None:
        in_use = tl.sum((end > start).to(tl.int32), 0)
        few = tl.max(end, 0) <= FEW_ROWS * in_use
        tiles = tl.where(few == (ONLY == "few"), tiles, 0)
    through = tl.cumsum(tiles, 0)
    expert = tl.sum(((through <= tile) & (e < NUM_EXPERTS)).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - (through - tiles)) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_gate_up_kernel(
    x, weight, order, offsets, out, width, hidden, stride_x, max_tiles,
    TOP_K: tl.constexpr, KIND: tl.constexpr, NUM_EXPERTS: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
    ONLY: tl.constexpr, FEW_ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(gate)·up of BLOCK_M sorted pairs of one expert, BLOCK_N columns: x (T, width), weight (E, 2·hidden, width),
    out (pairs, hidden) in sorted order."""
    tile, column = _place(max_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert, first, end = _find_tile(tile, offsets, NUM_EXPERTS, BLOCK_E, BLOCK_M, ONLY, FEW_ROWS)
    if expert < NUM_EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        pair = tl.load(order + row, mask=row < end, other=0)
        k = tl.arange(0, BLOCK_K)
        from_x = x + (pair // TOP_K).to(tl.int64)[:, None] * stride_x + k[None, :]
        safe_n = tl.where(n < hidden, n, 0)
        from_gate = weight + (expert.to(tl.int64) * 2 * hidden + safe_n)[None, :] * width + k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, width, BLOCK_K):
            left = width - k0
            value = tl.load(from_x + k0, mask=(k < left)[None, :], other=0.0)
            gate_tile = tl.load(from_gate + k0, mask=(k < left)[:, None], other=0.0)
            up_tile = tl.load(from_gate + hidden.to(tl.int64) * width + k0, mask=(k < left)[:, None], other=0.0)
            gate = tl.dot(value, gate_tile, gate)
            up = tl.dot(value, up_tile, up)
        value = activate(gate, KIND) * up
        to = out + row.to(tl.int64)[:, None] * hidden + n[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < hidden)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_down_kernel(
    x, weight, order, offsets, out, width, rows, max_tiles,
    NUM_EXPERTS: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr, ONLY: tl.constexpr, FEW_ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M sorted pairs of one expert, BLOCK_N columns: x (pairs, width) sorted, weight (E, rows, width), out
    (pairs, rows) in the pairs' own order."""
    tile, column = _place(max_tiles, tl.cdiv(rows, BLOCK_N), GROUP)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert, first, end = _find_tile(tile, offsets, NUM_EXPERTS, BLOCK_E, BLOCK_M, ONLY, FEW_ROWS)
    if expert < NUM_EXPERTS:
        row = first + tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        from_x = x + tl.where(row < end, row, first).to(tl.int64)[:, None] * width + k[None, :]
        safe_n = tl.where(n < rows, n, 0)
        from_w = weight + (expert.to(tl.int64) * rows + safe_n)[None, :] * width + k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, width, BLOCK_K):
            left = width - k0
            value = tl.load(from_x + k0, mask=(k < left)[None, :], other=0.0)
            acc = tl.dot(value, tl.load(from_w + k0, mask=(k < left)[:, None], other=0.0), acc)
        pair = tl.load(order + row, mask=row < end, other=0).to(tl.int64)
        to = out + pair[:, None] * rows + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (n < rows)[None, :])


@triton.jit
def combine_kernel(
    x, weights, shared, out, width, stride_s, TOP_K: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = Σ_j weights[t, j] · x[t, j] (+ shared[t]), in fp32, rounded once; x (T, TOP_K, width)."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = d < width
    acc = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        acc += tl.load(weights + pair) * tl.load(x + pair * width + d, mask=used, other=0.0).to(tl.float32)
    if shared is not None:
        acc += tl.load(shared + token * stride_s + d, mask=used, other=0.0).to(tl.float32)
    tl.store(out + token * width + d, acc.to(out.dtype.element_ty), mask=used)


@triton.jit
def _weight_tile(weight, first_row, n, k, rows, width):
    """Rows first_row + n, columns k of weight (…, width), 0 outside of n < rows, k < width."""
    at = weight + (first_row + n)[:, None] * width + k[None, :]
    return tl.load(at, mask=(n < rows)[:, None] & (k < width)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["chunks"])
def pair_gate_up_kernel(
    x, weight, shared_weight, experts, out, shared_out, width, hidden, shared_hidden, stride_x, chunks,
    TOP_K: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of act(gate)·up: of one of `chunks` pieces of the shared MLP (program 0 … chunks - 1 of the first
    axis, hidden columns each; shared_out (T, shared_hidden)), or of one pair (the others; out (pairs, hidden)).

    The next tiles load while two are multiplied."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    chunk = tl.program_id(0)
    is_shared = chunk < chunks
    pair = tl.maximum(chunk - chunks, 0).to(tl.int64)
    per_token = tl.cdiv(shared_hidden, hidden)
    column = chunk % per_token * hidden  # the first of this piece
    source = weight
    gate_row = column.to(tl.int64)
    rows = hidden
    if is_shared:
        source = shared_weight
        rows = tl.minimum(shared_hidden - column, hidden)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    to = shared_out + chunk // per_token * shared_hidden + column
    up_row = gate_row + shared_hidden
    token = (chunk // per_token).to(tl.int64)
    if not is_shared:
        gate_row = tl.load(experts + pair).to(tl.int64) * 2 * hidden
        up_row = gate_row + hidden
        to = out + pair * hidden
        token = pair // TOP_K
    row = x + token * stride_x
    gate_tile = _weight_tile(source, gate_row, n, k, rows, width)
    up_tile = _weight_tile(source, up_row, n, k, rows, width)
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        value = tl.load(row + k0 + k, mask=k0 + k < width, other=0.0).to(tl.float32)[None, :]
        next_gate_tile = _weight_tile(source, gate_row, n, k0 + BLOCK_K + k, rows, width)
        next_up_tile = _weight_tile(source, up_row, n, k0 + BLOCK_K + k, rows, width)
        gate += gate_tile.to(tl.float32) * value
        up += up_tile.to(tl.float32) * value
        gate_tile = next_gate_tile
        up_tile = next_up_tile
    value = activate(tl.sum(gate, 1), KIND) * tl.sum(up, 1)
    tl.store(to + n, value.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def pair_down_kernel(
    x, weight, weights, experts, shared_x, shared_weight, shared, out, width, rows, shared_width, stride_s,
    TOP_K: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_N columns of Σ_j weights_j · W_j·x_j (+ shared_weight·shared_x) (+ shared); x (T, TOP_K, width),
    shared_x (T, shared_width), out (T, rows).

    One loop over the tiles of all its experts, so that the next tile loads across their borders, too."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    zero = tl.zeros((), tl.int64)
    if shared_weight is not None:
        shared_tile = _weight_tile(shared_weight, zero, n, k, rows, shared_width)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_pair = token * TOP_K
    tile = _weight_tile(weight, tl.load(experts + first_pair).to(tl.int64) * rows, n, k, rows, width)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if shared_weight is not None:
        for k0 in range(0, shared_width, BLOCK_K):
            at = k0 + k
            value = tl.load(shared_x + token * shared_width + at, mask=at < shared_width, other=0.0).to(tl.float32)
            next_shared_tile = _weight_tile(shared_weight, zero, n, at + BLOCK_K, rows, shared_width)
            acc += shared_tile.to(tl.float32) * value[None, :]
            shared_tile = next_shared_tile
    steps = tl.cdiv(width, BLOCK_K)
    for step in range(steps * TOP_K):
        pair = first_pair + step // steps
        at = step % steps * BLOCK_K + k
        value = tl.load(x + pair * width + at, mask=at < width, other=0.0).to(tl.float32) * tl.load(weights + pair)
        following = tl.minimum(step + 1, steps * TOP_K - 1)
        expert = tl.load(experts + first_pair + following // steps).to(tl.int64)
        next_tile = _weight_tile(weight, expert * rows, n, following % steps * BLOCK_K + k, rows, width)
        acc += tile.to(tl.float32) * value[None, :]
        tile = next_tile
    y = tl.sum(acc, 1)
    if shared is not None:
        y += tl.load(shared + token * stride_s + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out + token * rows + n, y.to(out.dtype.element_ty), mask=n < rows)


MOST_PAIRS = 32  # computed each on its own; beyond, experts shared by tokens make sorting pay


def refuses_route(logits: Tensor, bias: Tensor | None, routing: Routing) -> str | None:
    """Why this backend cannot take the call, or None."""
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        return "it takes contiguous fp32 logits"
    return None if logits.shape[1] <= 1024 else "it holds at most 1024 experts"


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits (T, E) fp32 → weights (T, k) fp32, experts (T, k) int64; the lower expert wins among equals."""
    tokens, num_experts = logits.shape
    weights = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((tokens, routing.top_k), dtype=torch.int64, device=logits.device)
    if tokens:
        block = next_power_of_2(num_experts)
        early = early_launch_options(logits.device)["PDL"]
        constants = (
            ("NUM_EXPERTS", num_experts), ("TOP_K", routing.top_k), ("SIGMOID", routing.scoring == "sigmoid"),
            ("NUM_GROUPS", routing.num_groups), ("TOPK_GROUPS", routing.topk_groups),
            ("NORMALISE", routing.norm_topk_prob), ("PDL", early), ("BLOCK_E", block),
            ("BLOCK_G", next_power_of_2(routing.num_groups)),
            ("BLOCK_K", next_power_of_2(routing.top_k)),
        )  # fmt: skip
        arguments = (logits, bias, weights, experts, routing.scaling_factor)
        num_warps = 1 if block * routing.num_groups <= 256 else 4
        launch_by_arguments(route_kernel, (tokens, 1, 1), arguments, constants, num_warps=num_warps, launch_pdl=early)
    return weights, experts


def refuses_mix_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None,
    shared_gate_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why this backend cannot take the call, or None."""
    if (
        any(t is not None and t.dtype != x.dtype for t in (gate_up, down, shared_gate_up, shared_down))
        or x.dtype == torch.float64
    ):
        return f"it multiplies tensors of one dtype up to fp32, not {x.dtype} by {gate_up.dtype}"
    if x.dtype == torch.float32 and x.is_cuda and experts.numel() > MOST_PAIRS:
        return "it would multiply fp32 as tf32"
    plain = gate_up.is_contiguous() and down.is_contiguous() and x.stride(1) == 1
    plain = plain and (shared is None or shared.stride(1) == 1)
    plain = plain and all(t is None or t.is_contiguous() for t in (shared_gate_up, shared_down))
    return None if plain and weights.dtype == torch.float32 else "it takes contiguous rows and fp32 weights"


def mix_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None,
    shared_gate_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (T, D), weights and experts (T, k), gate_up (E, 2·H, D), down (E, D, H) → (T, D); shared_gate_up (2·S, D) and
    shared_down (D, S): of an MLP for every token."""
    weights, experts = weights.contiguous(), experts.contiguous()
    if experts.numel() == 0:
        return torch.empty_like(x)
    if experts.numel() <= MOST_PAIRS:
        return _mix_pairs(x, weights, experts, gate_up, down, activation, shared, shared_gate_up, shared_down)
    if shared_gate_up is not None and shared_down is not None:
        own = gated_activation(x @ shared_gate_up.t(), activation) @ shared_down.t()
        shared = own if shared is None else shared + own
    return _mix_grouped(x, weights, experts, gate_up, down, activation, shared)


def _mix_pairs(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None,
    shared_gate_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tokens, dim = x.shape
    top_k, hidden = experts.shape[1], down.shape[2]
    h = torch.empty((tokens * top_k, hidden), dtype=x.dtype, device=x.device)
    shared_hidden = hidden if shared_down is None else shared_down.shape[1]
    shared_h = None if shared_down is None else torch.empty((tokens, shared_hidden), dtype=x.dtype, device=x.device)
    chunks = 0 if shared_down is None else tokens * ceil_div(shared_hidden, hidden)
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    early = early_launch_options(x.device)["PDL"]
    block_n, block_k, num_warps = PAIR_GATE_UP_TILE
    launch_by_arguments(
        pair_gate_up_kernel, (chunks + tokens * top_k, ceil_div(hidden, block_n), 1),
        (x, gate_up, gate_up if shared_gate_up is None else shared_gate_up, experts,
         h, h if shared_h is None else shared_h, dim, hidden, shared_hidden, x.stride(0), chunks),
        (("TOP_K", top_k), ("KIND", activation), ("PDL", early), ("BLOCK_N", block_n), ("BLOCK_K", block_k)),
        num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip
    block_n, block_k, num_warps = PAIR_DOWN_TILE
    launch_by_arguments(
        pair_down_kernel, (tokens, ceil_div(dim, block_n), 1),
        (h, down, weights, experts, shared_h, shared_down, shared, out, hidden, dim, shared_hidden,
         0 if shared is None else shared.stride(0)),
        (("TOP_K", top_k), ("PDL", early), ("BLOCK_N", block_n), ("BLOCK_K", block_k)),
        num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip
    return out


def _mix_grouped(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None
) -> Tensor:
    tokens, dim = x.shape
    top_k, (num_experts, _, hidden) = experts.shape[1], down.shape
    pairs = tokens * top_k
    early = early_launch_options(x.device)["PDL"]
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=x.device)
    constants = (("NUM_EXPERTS", num_experts), ("PDL", early), ("BLOCK", 2048))
    arguments = (experts, order, offsets, pairs)
    launch_by_arguments(sort_kernel, (num_experts, 1, 1), arguments, constants, launch_pdl=early)
    h = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    y = torch.empty((pairs, dim), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    common = (("NUM_EXPERTS", num_experts), ("PDL", early), ("BLOCK_E", next_power_of_2(num_experts)))
    for only, tile, _ in (sorts := grouped_tiles(tokens, pairs / num_experts)):
        tiles = most_tiles(pairs, num_experts, tile.block_m)
        launch_by_arguments(
            grouped_gate_up_kernel, (tiles * ceil_div(hidden, tile.block_n), 1, 1),
            (x, gate_up, order, offsets, h, dim, hidden, x.stride(0), tiles),
            (("TOP_K", top_k), ("KIND", activation), *common, ("ONLY", only), *tile.blocks()),
            launch_pdl=early, **tile.options(),
        )  # fmt: skip
    for only, _, tile in sorts:
        tiles = most_tiles(pairs, num_experts, tile.block_m)
        launch_by_arguments(
            grouped_down_kernel, (tiles * ceil_div(dim, tile.block_n), 1, 1),
            (h, down, order, offsets, y, hidden, dim, tiles), (*common, ("ONLY", only), *tile.blocks()),
            launch_pdl=early, **tile.options(),
        )  # fmt: skip
    launch_by_arguments(
        combine_kernel, (tokens, ceil_div(dim, 1024), 1),
        (y, weights, shared, out, dim, 0 if shared is None else shared.stride(0)),
        (("TOP_K", top_k), ("PDL", early), ("BLOCK", 1024)), launch_pdl=early,
    )  # fmt: skip
    return out


def most_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """A bound on Σ_e ceil(pairs of e / block_m) that needs shapes only."""
    return min(num_experts, pairs) + pairs // block_m


class GroupedTile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def blocks(self) -> Constants:
        """The kernels' last constants, in their order."""
        return (
            ("FEW_ROWS", FEW_ROWS), ("GROUP", 12),
            ("BLOCK_M", self.block_m), ("BLOCK_N", self.block_n), ("BLOCK_K", self.block_k),
        )  # fmt: skip

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# BLOCK_N, BLOCK_K, warps; µs of both on an H100 beside the time to read the weights at 3.02 TB/s, DeepSeek-V2-Lite's
# experts, 1 / 2 / 4 tokens: 45 / 34, 75 / 69, 134 / 115 (2026-11-24, Triton 3.6)
PAIR_GATE_UP_TILE = (8, 512, 4)
PAIR_DOWN_TILE = (8, 512, 4)


FEW_ROWS = 64  # of each expert in use, on average
FEW = GroupedTile(32, 64, 128, 4, 3), GroupedTile(64, 128, 64, 4, 3)  # of the gate-up and the down product
MANY = GroupedTile(128, 128, 64, 8, 4), GroupedTile(128, 256, 64, 8, 3)


def grouped_tiles(tokens: int, pairs_per_expert: float) -> list[tuple[str | None, GroupedTile, GroupedTile]]:
    """Which tiles to launch, each with when its programs stay: an expert in use has on average `pairs_per_expert` rows
    at least, where the tokens are spread over all, and `tokens` at most.

    µs on an H100 of both products, few / many, beside the floor, DeepSeek-V2-Lite's experts (2026-11-24, Triton 3.6):
    tokens spread over all 64, 64: 388 / 505, 367; 256: 398 / 520, 367; 512: 440 / 479, 367; 2048: 1056 / 602, 367;
    all to the same 6, 64: 58 / 76, 34; 128: 73 / 58, 34; 256: 118 / 64, 38; 512: 210 / 106, 76.
    """
    if tokens <= FEW_ROWS:
        return [(None, *FEW)]
    if pairs_per_expert > FEW_ROWS:
        return [(None, *MANY)]
    return [("few", *FEW), ("many", *MANY)]
