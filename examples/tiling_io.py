"""Why tiled attention is faster: the same numbers with far fewer reads and writes of slow memory, counted one by one.

    python examples/tiling_io.py [--quick] [--save]

Plain Python, no library: `SlowMemory` is a GPU's HBM (or a CPU's DRAM) that counts every number it gives or takes;
    Python
variables are the fast memory on the chip. Standard attention writes its N × N scores and probabilities out and reads
them back. Tiled attention ("FlashAttention", Dao et al., 2022, algorithm 1, with the loop order of
"FlashAttention-2") keeps a tile of scores on the chip and carries only a running maximum and sum, so it needs about
2·N·d·(N / rows of a tile) numbers instead of about 4·N².
"""

import math
import random

import figures


class SlowMemory:
    """A matrix in slow memory; every number read or written is counted for all matrices together."""

    traffic = 0

    def __init__(self, rows: list[list[float]]) -> None:
        self._rows = rows

    def read(self, first: int, end: int) -> list[list[float]]:
        """Rows [first, end), brought onto the chip."""
        part = [list(row) for row in self._rows[first:end]]
        SlowMemory.traffic += sum(map(len, part))
        return part

    def write(self, first: int, rows: list[list[float]]) -> None:
        """Rows from `first` on, taken off the chip."""
        SlowMemory.traffic += sum(map(len, rows))
        self._rows[first : first + len(rows)] = [list(row) for row in rows]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def standard_attention(q: SlowMemory, k: SlowMemory, v: SlowMemory, n: int, d: int, rows: int) -> SlowMemory:
    """S = QKᵀ/√d, P = softmax(S), O = PV, each step a pass over slow memory; `rows` of Q at a time share a read of K
    and V.
    """
    scores, probs, out = (SlowMemory([[] for _ in range(n)]) for _ in range(3))
    for i in range(0, n, rows):
        q_tile, keys = q.read(i, i + rows), k.read(0, n)
        scores.write(i, [[dot(query, key) / math.sqrt(d) for key in keys] for query in q_tile])
    for i in range(n):
        (row,) = scores.read(i, i + 1)
        highest = max(row)
        weights = [math.exp(s - highest) for s in row]
        probs.write(i, [[w / sum(weights) for w in weights]])
    for i in range(0, n, rows):
        p_tile, values = probs.read(i, i + rows), v.read(0, n)
        out.write(i, [[dot(p, list(column)) for column in zip(*values, strict=True)] for p in p_tile])
    return out


def tiled_attention(q: SlowMemory, k: SlowMemory, v: SlowMemory, n: int, d: int, rows: int, keys: int) -> SlowMemory:
    """The same O, tile by tile: scores never leave the chip."""
    out = SlowMemory([[] for _ in range(n)])
    for i in range(0, n, rows):
        q_tile = q.read(i, i + rows)
        highest = [-math.inf] * len(q_tile)  # of the scores seen so far
        total = [0.0] * len(q_tile)  # of exp(score − highest)
        o_tile = [[0.0] * d for _ in q_tile]
        for j in range(0, n, keys):
            k_tile, v_tile = k.read(j, j + keys), v.read(j, j + keys)
            for r, query in enumerate(q_tile):
                scores = [dot(query, key) / math.sqrt(d) for key in k_tile]
                new_highest = max(highest[r], *scores)
                rescale = math.exp(highest[r] - new_highest)  # what was summed against the old maximum
                weights = [math.exp(s - new_highest) for s in scores]
                total[r] = total[r] * rescale + sum(weights)
                columns = zip(*v_tile, strict=True)
                o_tile[r] = [o * rescale + dot(weights, list(c)) for o, c in zip(o_tile[r], columns, strict=True)]
                highest[r] = new_highest
        out.write(i, [[o / total[r] for o in row] for r, row in enumerate(o_tile)])
    return out


def traffic_of(attend, *arguments: int) -> tuple[int, list[list[float]]]:
    """Numbers moved by one run on fresh matrices, and its output."""
    n, d = arguments[:2]
    random.seed(0)
    q, k, v = (SlowMemory([[random.gauss(0, 1) for _ in range(d)] for _ in range(n)]) for _ in range(3))
    SlowMemory.traffic = 0
    out = attend(q, k, v, *arguments)
    moved = SlowMemory.traffic
    return moved, out.read(0, n)


def main() -> None:
    """Count both for growing sequences and growing chips; check that they agree and that the counts are the
    formulas'.
    """
    options = figures.parser(__doc__, "tiling_io.png").parse_args()
    d, rows, keys = 16, 32, 32
    lengths = [32, 64, 128] if options.quick else [64, 128, 256, 512]
    print(f"d = {d}, tiles of {rows} rows × {keys} keys; numbers read and written in slow memory")
    print("     N   standard      tiled  ratio  largest difference")
    counts = []
    for n in lengths:
        standard, expected = traffic_of(standard_attention, n, d, rows)
        tiled, actual = traffic_of(tiled_attention, n, d, rows, keys)
        difference = max(abs(a - b) for x, y in zip(expected, actual, strict=True) for a, b in zip(x, y, strict=True))
        assert difference < 1e-12
        assert standard == 4 * n * n + 2 * n * d * (n // rows) + 2 * n * d
        assert tiled == 2 * n * d * (n // rows) + 2 * n * d
        counts.append((standard, tiled))
        print(f"{n:6} {standard:10} {tiled:10} {standard / tiled:6.1f}  {difference:.0e}")
    n = lengths[-1]
    tile_rows = [2**i for i in range(1, 8) if 2**i <= n]
    by_chip = [traffic_of(tiled_attention, n, d, r, keys)[0] for r in tile_rows]
    print(f"N = {n}, by rows of a tile: " + ", ".join(f"{r}: {c}" for r, c in zip(tile_rows, by_chip, strict=True)))
    if options.save:
        figure, (left, right) = figures.panels(2, "Attention's traffic with slow memory (d = 16)")
        left.loglog(lengths, [c[0] for c in counts], marker="o", label="standard: writes N × N out")
        left.loglog(lengths, [c[1] for c in counts], marker="o", label=f"tiled, {rows} rows on the chip")
        left.set(xlabel="N (tokens)", ylabel="numbers read and written")
        left.legend()
        right.loglog(tile_rows, by_chip, marker="o", label="tiled")
        right.axhline(counts[-1][0], color=figures.COLOURS[1], linestyle="--", label="standard, 32 rows share K and V")
        right.set(xlabel="rows of Q that fit on the chip", ylabel=f"numbers read and written, N = {n}")
        right.legend()
        figures.save(figure, options.save)


if __name__ == "__main__":
    main()
