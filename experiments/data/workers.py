"""Batches that worker processes make, in turns, where one process is not enough.

Grain's own state of workers says how many there were, and fits no other number. Here it
is the number of the next batch, as without workers: a run goes on with any number.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any

import grain


class InProcesses(grain.IterDataset):
    """The elements of a dataset in order, each made by one of several processes.

    Args:
      source: any element of it can be made by itself; it travels to every process.
      options: threads of each process.
      workers: how many processes, at least 1.
    """

    def __init__(
        self, source: grain.MapDataset, options: grain.ReadOptions, workers: int
    ) -> None:
        super().__init__()
        self._source, self._options = source, options
        self._processes = grain.MultiprocessingOptions(workers)

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)

    def rest(self, start: int) -> grain.DatasetIterator:
        """Elements from one on; the processes start with the first that is asked for."""
        elements = self._source[start:].to_iter_dataset(self._options)
        return iter(elements.mp_prefetch(self._processes, worker_init_fn=_serve))


class _Iterator(grain.DatasetIterator):
    def __init__(self, dataset: InProcesses) -> None:
        super().__init__()
        self._dataset, self._next = dataset, 0
        self._workers: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        self._assert_not_closed()
        if self._workers is None:
            self._workers = self._dataset.rest(self._next)
        element = next(self._workers)
        self._next += 1
        return element

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._end()
        self._next = state["next_index"]

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def _serve(number: int, count: int) -> None:
    """In a worker: Ctrl-C is for the process that trains, whose end is the worker's too.

    Grain ends its workers where that process ends in order; after kill -9 they would wait
    for it for ever.
    """
    del number, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trains = multiprocessing.parent_process()
    assert trains is not None

    def follow() -> None:
        trains.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
