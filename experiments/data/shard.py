"""Which rows of every global batch a process makes, where each makes its own only."""

from typing import NamedTuple


class Shard(NamedTuple):
    """One of `count` equal shares of the rows of every batch, the `index`-th.

    A process alone has all of them. The rows of a share are neighbours and the shares
    are in order, so that laid one after the other they are the global batch.
    """

    index: int = 0
    count: int = 1

    def rows(self, rows: int) -> range:
        """Numbers of this share's rows of a global batch.

        Args:
          rows: of the global batch.
        Raises:
          ValueError: no such share, or the rows do not divide into equal ones.
        """
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index} of {self.count}: {self.count} shards have the "
                f"numbers 0 to {self.count - 1}"
            )
        if rows < 1 or rows % self.count:
            raise ValueError(
                f"{rows} rows do not divide into {self.count} equal shares; choose a "
                "batch size that is a multiple of the number of processes"
            )
        share = rows // self.count
        return range(self.index * share, (self.index + 1) * share)


WHOLE = Shard()
