"""A picture of what the GPU does in a decode step, from a timeline that `benchmarks/engine.py --profile` wrote.

    python benchmarks/timeline.py trace.json picture.png [--title TEXT]

Above, one whole step: every kernel at its place, coloured by kind. In the middle, a part of it, enlarged. Below, the
share of the step's time that each kind has, counted where it ran alone or was the first of those that overlap.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import NamedTuple

KINDS = {  # first match wins
    "attention": ("decode_kernel", "forward_kernel", "attention"),
    "combining parts": ("combine",),
    "experts": ("grouped", "pair_", "route", "sort_kernel"),
    "matrix products": ("nvjet", "gemm", "gemv", "cutlass", "splitK"),
    "sampling": ("first_pass", "best_kernel", "truncate", "weigh_kernel", "sample"),
    "norm, rotation, activation": ("norm", "rotate", "activation", "absorb", "values_kernel"),
    "other": ("",),
}
COLOURS = dict(zip(KINDS, ("#4477aa", "#66ccee", "#aa3377", "#ee6677", "#ccbb44", "#228833", "#bbbbbb"), strict=True))
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


class Event(NamedTuple):
    """Microseconds from the beginning of the step."""

    start: float
    length: float
    kind: str


def kind_of(name: str) -> str:
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


def middle_step(path: Path) -> list[Event]:
    """The kernels of one step in the middle: after one copy of drawn tokens to the host, to the next."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = [event for event in json.loads(text)["traceEvents"] if event.get("cat") in GPU_EVENTS]
    found.sort(key=lambda event: event["ts"])
    copies = [i for i, event in enumerate(found) if "DtoH" in event["name"]]
    if len(copies) < 2:
        raise ValueError(f"trace: expected the copies of two steps' tokens, got {len(copies)} in {path}")
    first, last = copies[len(copies) // 2 - 1] + 1, copies[len(copies) // 2]
    begin = found[first]["ts"]
    return [Event(event["ts"] - begin, event["dur"], kind_of(event["name"])) for event in found[first : last + 1]]


def time_by_kind(events: list[Event]) -> dict[str, float]:
    """Microseconds; an overlap counts for the event that began first."""
    times, reached = dict.fromkeys(KINDS, 0.0), 0.0
    for event in events:
        end = event.start + event.length
        times[event.kind] += max(0.0, end - max(reached, event.start))
        reached = max(reached, end)
    return times


def draw(events: list[Event], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (whole, part, shares) = pyplot.subplots(3, 1, figsize=(12, 5), height_ratios=(2, 2, 1.4))
    end = max(event.start + event.length for event in events)
    middle = next(event.start for event in events if event.start > end / 2 and event.kind == "attention")
    attention = [event.start for event in events if event.kind == "attention"]
    layer = (attention[-1] - attention[0]) / max(len(attention) - 1, 1)
    for axes, first, last in ((whole, 0.0, end), (part, middle - 0.1 * layer, middle + 2.4 * layer)):
        for event in events:
            if event.start + event.length >= first and event.start <= last:
                row = 1 if event.kind == "combining parts" else 0  # it waits beside the kernel before it
                axes.broken_barh([(event.start, event.length)], (row, 0.9), color=COLOURS[event.kind])
        axes.set(xlim=(first, last), yticks=[], xlabel="µs")
    times, left = time_by_kind(events), 0.0
    for kind, time in times.items():
        shares.barh(0, time, left=left, color=COLOURS[kind], label=f"{kind} {time:.0f} µs")
        left += time
    shares.barh(0, max(end - left, 0.0), left=left, color="white", edgecolor="black", label=f"idle {end - left:.0f} µs")
    shares.set(xlim=(0, end), yticks=[], xlabel="µs")
    shares.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.6), frameon=False)
    whole.set_title(f"{title}: one step, {end:.0f} µs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="Decode")
    arguments = parser.parse_args()
    draw(middle_step(arguments.trace), arguments.picture, arguments.title)


if __name__ == "__main__":
    main()
