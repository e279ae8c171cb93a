"""The memory report as a picture: the block map over time, what the cache held, and the three wastes as bars.

Needs matplotlib (the `plot` extra), loaded only when a picture is drawn.
"""

import colorsys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.engine.memory_report import CACHED, FIRST_OWNER, FREE, NUM_OWNERS, PARTS, SHARED, TAIL, MemoryTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, PAPER = "#1f2430", "#ffffff"
MAP_COLOURS = {FREE: "#f1f3f6", CACHED: "#c9d1dc", SHARED: "#1f2430", TAIL: "#e4572e"}
PART_COLOURS = {
    "used": "#2a7f9e",
    "reserved": "#f2b134",
    "internal": "#e4572e",
    "external": "#8d3b72",
    "cached": "#c9d1dc",
    "free": "#f1f3f6",
}
MAX_MAP_ROWS = 512  # more blocks than this are drawn as every k-th


def plot_memory(trace: MemoryTrace, path: str | Path) -> None:
    """Draws a run to path; the ending names the format: .png or .svg.

    Raises ValueError for another ending or a trace without samples, ImportError without matplotlib.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"path: expected a name that ends in .png or .svg, got {str(path)!r}")
    if not trace.samples:
        raise ValueError("trace: expected at least one sample, got none; run something while it records")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'octavo[plot]'") from error
    figure = Figure(figsize=(12, 8.4), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    _draw_map(figure.add_subplot(grid[0, :]), trace)
    _draw_parts(figure.add_subplot(grid[1, 0]), trace)
    _draw_wastes(figure.add_subplot(grid[1, 1]), trace)
    figure.savefig(path, dpi=150)


def _owner_colour(owner: int) -> tuple[float, float, float]:
    """Neighbouring requests get hues far apart (golden ratio), all calm enough for red tails to stand out."""
    return colorsys.hls_to_rgb(0.36 + 0.34 * (owner * 0.618034 % 1), 0.56 + 0.16 * (owner * 0.381966 % 1), 0.42)


def _draw_map(axes: "Axes", trace: MemoryTrace) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    palette = [MAP_COLOURS[cell] for cell in range(FIRST_OWNER)] + [_owner_colour(i) for i in range(NUM_OWNERS)]
    num_blocks = len(trace.maps[0])
    every = -(-num_blocks // MAX_MAP_ROWS)
    rows = [[column[block] for column in trace.maps] for block in range(0, num_blocks, every)]
    extent = (0.0, float(len(trace.maps) * trace.map_stride), float(num_blocks), 0.0)
    axes.imshow(
        rows,
        cmap=ListedColormap(palette),
        vmin=0,
        vmax=len(palette) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    _style(axes, "Every block of the KV cache, over time", "step", "block")
    labels = {"one sequence (a hue per request)": _owner_colour(0), "shared": MAP_COLOURS[SHARED]}
    labels |= {"last block, partly empty": MAP_COLOURS[TAIL], "cached": MAP_COLOURS[CACHED], "free": MAP_COLOURS[FREE]}
    patches = [Patch(facecolor=colour, edgecolor="#aab2bd", linewidth=0.5) for colour in labels.values()]
    axes.legend(
        patches,
        list(labels),
        ncols=5,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
        fontsize=9,
        handlelength=1,
    )


def _draw_parts(axes: "Axes", trace: MemoryTrace) -> None:
    order = ("used", "internal", "reserved", "external", "cached", "free")
    mebibytes = [[getattr(sample, part) / 2**20 for sample in trace.samples] for part in order]
    steps = range(len(trace.samples))
    axes.stackplot(steps, mebibytes, colors=[PART_COLOURS[part] for part in order], labels=order, linewidth=0)
    axes.set_xlim(0, max(len(trace.samples) - 1, 1))
    axes.set_ylim(0, trace.samples[0].cache / 2**20)
    _style(axes, "What the bytes hold", "step", "MiB")
    axes.legend(ncols=3, loc="upper center", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, handlelength=1)


def _draw_wastes(axes: "Axes", trace: MemoryTrace) -> None:
    report = trace.report()
    shares = report.shares()
    names = list(shares)[::-1]
    left = [0.0] * len(names)
    for part in PARTS[:4]:
        widths = [100 * shares[name][part] for name in names]
        axes.barh(names, widths, left=left, color=PART_COLOURS[part], label=part, height=0.62)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 6:
                light = "white" if part != "reserved" else INK
                axes.text(start + width / 2, row, f"{width:.0f} %", ha="center", va="center", color=light, fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 100)
    _style(
        axes, f"Of the bytes held: paged wastes {report.waste_fraction:.1%}", "% of held bytes, mean over the run", ""
    )
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9, handlelength=1)


def _style(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold", pad=8)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aab2bd")
