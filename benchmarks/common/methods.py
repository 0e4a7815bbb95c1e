"""The compared methods of gradient checkpointing, and tables of their rows."""

from collections.abc import Callable

from common.recording import table

# The stock methods run Transformers' own scan, in processes that do not import this package.
METHODS = {
    "none": "no checkpointing",
    "every-layer": "every layer (Transformers' own)",
    "every-sqrt": "every √L layers",
    "every-layer-ssd-scan": "every layer, with this package's scan",
    "MA-GC": "MA-GC",
    "MA-GC-minimal": 'MA-GC, memory_budget="minimal"',
    "MA-GC-offload": "MA-GC, checkpoints in host memory",
    "MA-GC-offload-2.8GB": "MA-GC, offload in 2.8 GB",
}
AUTHORS = "the authors' code"  # only `side_by_side.py` runs it
REFERENCE = "every-layer"
CPU_METHODS = ["none", "every-layer", "every-sqrt", "every-layer-ssd-scan", "MA-GC", "MA-GC-minimal"]
# On a GPU, where the stock methods have kernels to scan with; the most important first.
GPU_METHODS = ["MA-GC", "none", "MA-GC-minimal", "MA-GC-offload-2.8GB", "every-layer", "every-sqrt"]


class RowsByLength:
    """Rows of a file as tables with a column for each length.

    Attributes:
        methods: methods of the file, in the order of `METHODS`.
        lengths: lengths of the file in tokens, in order.
    """

    def __init__(self, results: dict):
        self.rows = {(row["method"], row["length"]): row for row in results["rows"]}
        self.lengths = sorted({length for _, length in self.rows})
        self.methods = [m for m in (*METHODS, AUTHORS) if any(m == found for found, _ in self.rows)]

    def get(self, method: str, length: int, entry: str):
        """Return an entry of a row, or None."""
        return self.rows.get((method, length), {}).get(entry)

    def line(self, name: str, method: str, cell: Callable[[dict], str | None]) -> list[str]:
        """Return a line of a table: `cell` of each row of a method, and a dash where nothing was measured."""
        found = [self.rows.get((method, length), {}) for length in self.lengths]
        return [name, *(cell(row) or "–" if "seconds" in row else "–" for row in found)]

    def ratios(self, name: str, method: str, reference: str, entry: str, digits: int = 2) -> list[str]:
        """Return a line with an entry of a method as a multiple of the same of another method."""

        def ratio(row: dict) -> str | None:
            other = self.get(reference, row["length"], entry)
            return f"{row[entry] / other:.{digits}f}" if other else None

        return self.line(name, method, ratio)

    def table(self, unit: str, lines: list[list[str]]) -> list[str]:
        """Return the lines of a Markdown table under a header of the lengths."""
        return table([unit, *(f"{length:,}" for length in self.lengths)], lines)


def cell_size(row: dict) -> str:
    """Return the layers and tokens of a cell in a row's plan."""
    return f"{row['plan']['layer_interval']} × {row['plan']['sequence_interval']:,}"
