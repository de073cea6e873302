"""Padded batch shapes: a row's bits must not depend on how many rows run beside it."""

from dataclasses import dataclass

LENGTH_STEP = 32


@dataclass(frozen=True)
class BatchShapes:
    """Row counts a pass may have; batches are padded to the next one.

    Matrix kernels choose their summation order by shape. Measured (fp32, one thread, oneDNN/MKL
    with AVX-512): every row count that is a multiple of 8 gives a row the same bits, 1 and 2 rows
    do not. `selfcheck.py` tests this on the machine and model at hand and leaves only counts that
    agree.

    Attributes:
        counts: allowed numbers of rows, ascending; the last one holds all slots.
    """

    counts: tuple[int, ...]

    @classmethod
    def up_to(cls, max_rows: int) -> "BatchShapes":
        """Multiples of 8 up to 64, of 32 above."""
        counts = [*range(8, 65, 8), *range(96, max_rows + 32, 32)]
        last = next(count for count in counts if count >= max_rows)
        return cls(tuple(count for count in counts if count <= last))

    @property
    def largest(self) -> int:
        """Rows that hold every slot."""
        return self.counts[-1]

    def rows(self, num_rows: int) -> int:
        """The smallest allowed count of at least `num_rows`."""
        return next(count for count in self.counts if count >= num_rows)

    def only(self, counts: set[int]) -> "BatchShapes":
        """Shapes restricted to `counts`; the largest always stays."""
        return BatchShapes(tuple(c for c in self.counts if c in counts or c == self.largest))


def padded_length(num_tokens: int) -> int:
    """Tokens rounded up to a multiple of `LENGTH_STEP`."""
    return -(-num_tokens // LENGTH_STEP) * LENGTH_STEP
