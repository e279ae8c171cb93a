"""The Hopper kernels compile for sm_90 without a GPU, and what the assembler made of them is what the design needs.

Read from its report and its output: both products run on the tensor cores (HGMMA), the main loops keep everything in
registers, no product waits for the one before it, and the consumers did get the registers of the producer.
"""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="the Hopper kernels are written in Triton's Gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from octavo.kernels.hopper import flash_bwd, flash_fwd  # noqa: E402
from octavo.kernels.hopper.backward_kernel import backward_kernel  # noqa: E402
from octavo.kernels.hopper.gluon_compat import FIRST_BARRIER  # noqa: E402

SHARED_MEMORY = 227 * 1024  # bytes that one block of sm_90 may have

SUMS_LAYOUT = repr(flash_bwd._SUMS_LAYOUT)

PLAIN = {"RIGHT": False, "LEFT": False, "VARLEN": False, "PAGE": 0, "EVEN": True, "SOFTCAP": False, "SINK": False}
CAUSAL = PLAIN | {"RIGHT": True, "EVEN": False}
PAGED = CAUSAL | {"VARLEN": True, "PAGE": 16}
EVERYTHING = PLAIN | {"RIGHT": True, "LEFT": True, "VARLEN": True, "EVEN": False, "SOFTCAP": True, "SINK": True}


class Compiled(NamedTuple):
    shared: int
    report: str  # ptxas -v: registers, spills, warnings
    instructions: list[tuple[int, str]]  # (address, text)


def compile_forward(widths: tuple[int, int], dtype: str, flags: dict[str, int], folder: Path) -> Compiled:
    """`flash_fwd_kernel` with the tile that `flash_fwd` would choose, through ptxas."""
    tile = (flash_fwd.PAGED_TILES if flags["PAGE"] else flash_fwd.TILES)[widths]
    boxes = {
        "q_desc": (64, widths[0]),
        "k_desc": (flags["PAGE"], 64) if flags["PAGE"] else (tile.block_n, widths[0]),
        "v_desc": (flags["PAGE"], 64) if flags["PAGE"] else (tile.block_n, widths[1]),
        "o_desc": (64, widths[1]),
    }
    types = boxes_of_rows(boxes, dtype, flags["VARLEN"])
    types |= {"lse_ptr": "*fp32", "sink_ptr": "*fp32", "cu_q": "*i32", "cu_k": "*i32", "counter": "*i32"}
    types |= {"table": "*i32", "scale": "fp32", "cap": "fp32"}
    constants = (
        {"DEPTH": widths[0]}
        | flags
        | {
            "BLOCK_N": tile.block_n,
            "STAGES": tile.stages,
            "NUM_WG": tile.num_wg,
            "O_IN_Q": tile.out_in_q,
            "PAGER": tile.pager,
            "Q_IN_REGS": tile.q_in_registers,
            "DYNAMIC": True,
            "REGS": tile.registers,
        }
    )
    return compile_kernel(flash_fwd.flash_fwd_kernel, types, constants, tile.max_registers, folder)


def compile_backward(
    tile: flash_bwd.Tile, widths: tuple[int, int], dtype: str, flags: dict[str, int], folder: Path
) -> Compiled:
    """A kernel of `flash_bwd` through ptxas."""
    boxes = {
        "q_desc": (tile.block_m, widths[0]),
        "g_desc": (tile.block_m, widths[1]),
        **dict.fromkeys(("k_desc", "dk_desc"), (64, widths[0])),
        **dict.fromkeys(("v_desc", "dv_desc"), (64, widths[1])),
    }
    types = boxes_of_rows(boxes, dtype, flags["VARLEN"])
    if tile.sums_rows:
        types["acc_desc"] = f"tensordesc<fp32[{tile.sums_rows}, 32],{SUMS_LAYOUT}>"
    if tile.kernel is not backward_kernel:
        flags = {name: value for name, value in flags.items() if name != "IN_TURN"}
    types |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "cu_q": "*i32", "cu_k": "*i32", "turns": "*i32"}
    types |= {"scale": "fp32", "cap": "fp32", "out_scale": "fp32"}
    constants = flags | {"Q_STAGES": tile.q_stages, "G_STAGES": tile.g_stages, "REGS": tile.registers}
    return compile_kernel(tile.kernel, types, constants, tile.max_registers, folder)


def boxes_of_rows(boxes: dict[str, tuple[int, int]], dtype: str, varlen: int) -> dict[str, str]:
    """Types of tensor descriptors, by (rows, columns)."""
    before, layout = ("1, 1", flash_fwd._RAGGED_LAYOUT) if varlen else ("1", flash_fwd._LAYOUT)
    return {name: f"tensordesc<{dtype}[{before}, {rows}, 1, {dim}],{layout!r}>" for name, (rows, dim) in boxes.items()}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], max_registers: int, folder: Path
) -> Compiled:
    """A kernel of 4 + 4·consumers warps through Triton and ptxas."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "maxnreg": max_registers, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])
    cubin.write_bytes(compiled.asm["cubin"])
    report = _output(get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "again.cubin"))
    listing = _output(triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin))
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing)
    return Compiled(compiled.metadata.shared, report, [(int(address, 16), text) for address, text in found])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops that hold products and no epilogue."""
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) > address:
            continue
        body = [text for at, text in instructions if int(target[1], 16) <= at <= address]
        if any("HGMMA" in text for text in body) and not any("UTMASTG" in text for text in body):
            loops.append(body)
    return loops


def masks(body: list[str]) -> bool:
    """Whether a loop compares the keys' places, one comparison a score."""
    return sum("ISETP" in text for text in body) > 16


def assert_built_as_designed(compiled: Compiled, registers: int) -> None:
    """Tensor cores without serialised products, the registers where they belong, barriers that do not collide."""
    text = "\n".join(text for _, text in compiled.instructions)
    assert compiled.shared <= SHARED_MEMORY
    assert "serialized" not in compiled.report, "ptxas made the products wait for each other"
    assert re.search(r"HGMMA\.64x\d+x16\.F32", text)
    assert not re.search(r"\bHMMA\b", text), "a product left the warpgroup instructions"
    assert re.search(rf"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP\d, {registers:#x}", text)

    barriers = re.findall(r"BAR\.SYNC\.DEFER_BLOCKING (0x\w+), 0x80\b", text)
    assert {int(barrier, 16) for barrier in barriers} <= set(range(FIRST_BARRIER)), "Triton's barriers reach into ours"


# not all combinations: each takes some seconds
@pytest.mark.parametrize(
    ("widths", "dtype", "flags"),
    [
        ((64, 64), "bf16", CAUSAL),
        ((64, 64), "bf16", EVERYTHING),
        ((128, 128), "fp16", PLAIN),
        ((128, 128), "fp16", EVERYTHING),
        ((64, 64), "bf16", PAGED),
        ((128, 128), "bf16", PAGED),
        ((256, 128), "bf16", CAUSAL),
        ((256, 128), "bf16", CAUSAL | {"DEPTH": 192}),
        ((256, 256), "bf16", PLAIN),
        ((256, 256), "bf16", PAGED),
        ((256, 256), "bf16", EVERYTHING),
    ],
)
def test_forward_compiles_to_what_the_design_needs(
    widths: tuple[int, int], dtype: str, flags: dict[str, int], tmp_path: Path
) -> None:
    compiled = compile_forward(widths, dtype, flags, tmp_path)
    tile = (flash_fwd.PAGED_TILES if flags["PAGE"] else flash_fwd.TILES)[widths]
    assert_built_as_designed(compiled, tile.registers)

    loops = main_loops(compiled.instructions)
    assert len(loops) == (1 + flags["RIGHT"] + flags["LEFT"]) * tile.num_wg
    for body in loops:
        joined = "\n".join(body)
        assert joined.count("HGMMA") == flags.get("DEPTH", widths[0]) // 16 + tile.block_n // 16
        spilled = len(re.findall(r"\b(?:LDL|STL)\b", joined))
        # the masked loops run once or twice a tile
        assert spilled <= (8 if masks(body) else 0), "the main loop spills registers"
    assert sum(not masks(body) for body in loops) == tile.num_wg


BACKWARD_PLAIN = {"RIGHT": False, "LEFT": False, "VARLEN": False, "SOFTCAP": False, "IN_TURN": False}
BACKWARD_CAUSAL = BACKWARD_PLAIN | {"RIGHT": True}
BACKWARD_IN_TURN = BACKWARD_PLAIN | {"IN_TURN": True}


@pytest.mark.parametrize(
    ("tile", "widths", "dtype", "flags"),
    [
        (None, (64, 64), "fp16", BACKWARD_CAUSAL),
        (None, (128, 128), "bf16", BACKWARD_PLAIN),
        (None, (128, 128), "bf16", BACKWARD_IN_TURN),
        (None, (128, 128), "bf16", BACKWARD_CAUSAL | {"VARLEN": True}),
        (None, (256, 256), "bf16", BACKWARD_CAUSAL),
        (flash_bwd.TWO_PASSES, (256, 128), "bf16", BACKWARD_PLAIN),
        (flash_bwd.TWO_PASSES, (256, 256), "bf16", BACKWARD_CAUSAL),
    ],
)
def test_backward_compiles_to_what_the_design_needs(
    tile: flash_bwd.Tile | None, widths: tuple[int, int], dtype: str, flags: dict[str, int], tmp_path: Path
) -> None:
    tile = tile or flash_bwd.TILES[widths]
    compiled = compile_backward(tile, widths, dtype, flags, tmp_path)
    assert_built_as_designed(compiled, tile.registers)
    added_by_tma = any("UTMAREDG" in text for _, text in compiled.instructions)
    assert added_by_tma == (tile.sums_rows > 0)
    inner = [body for body in main_loops(compiled.instructions) if sum("HGMMA" in text for text in body) <= 32]
    assert len(inner) >= 3
    for body in inner:
        joined = "\n".join(body)
        stored, reloaded = (len(re.findall(rf"\b{name}\b", joined)) for name in ("STL", "LDL"))
        # masked loops run twice a head; sums in turn need more addresses than there are registers for
        allowed = 40 if masks(body) else 16 if flags["IN_TURN"] else 1
        assert stored + reloaded <= allowed, "the main loop spills registers"
