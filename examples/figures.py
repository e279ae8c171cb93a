"""What the examples share: their command line (`--quick`, `--save`) and the look of their pictures."""

import argparse
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = ["#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#64473a"]


def parser(description: str | None, picture: str) -> argparse.ArgumentParser:
    """An argument parser with --quick (small, for CI) and --save [PATH] (default docs/images/<picture>)."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="a small run, a few seconds")
    result.add_argument(
        "--save", type=Path, nargs="?", const=IMAGES / picture, metavar="PATH", help=f"write the picture ({picture})"
    )
    return result


def panels(count: int, title: str) -> tuple[Any, Any]:
    """A figure and its `count` axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
            "legend.frameon": False,
        }
    )
    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, 3.8), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=12)
    return figure, axes[0]


def save(figure: Any, path: Path) -> None:
    """Write the picture and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")
