"""Writes records and compacts until it is killed: `python journal_writer.py FOLDER`.

Not a test module: test_journal.py starts it. Says how many records are on disk.
"""

import sys

import numpy as np

import topkast_jax as tk

SHAPE = (2, 5000)


def first() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def left(number: int) -> tuple[np.ndarray, np.ndarray]:
    """What record `number` holds."""
    random = np.random.default_rng(number)
    places = np.sort(random.choice(np.prod(SHAPE), 400, replace=False))
    return places, random.normal(size=400).astype(np.float32)


def after(records: int) -> np.ndarray:
    """The reservoir after so many records."""
    theta = first().reshape(-1)
    for number in range(1, records + 1):
        places, values = left(number)
        theta[places] = values
    return theta.reshape(SHAPE)


if __name__ == "__main__":
    journal = tk.Journal(sys.argv[1])
    journal.begin(tk.Store({"kernel": first()}))
    while True:
        journal.append({"kernel": left(journal.records + 1)})
        print(journal.records, flush=True)
        journal.tidy(oldest=max(0, journal.records - 3), share=0.05)
