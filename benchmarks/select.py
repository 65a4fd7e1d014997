"""Exact selection by counting, against sorting and jax.lax.top_k.

    python -m benchmarks.select
    python -m benchmarks.select --sizes=1M,16M --repeats=3
    python -m benchmarks.select --quick

A tenth of float32 entries, |normal|, as a mask. Sorting and jax.lax.top_k give a
threshold, and their mask is what reaches it: more than a tenth where entries tie.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import topkast_jax as tk
from benchmarks import timing

SUFFIXES = {"": 1, "K": 2**10, "M": 2**20}
SHARE = 0.1
SKIPPED = "skipped"
COUNTING, RANDOM, SORT, LAX = "tk.top_k", "tk.random_k", "jnp.sort", "lax.top_k"
PASS = "one counting pass"

Mask = Bool[Array, " n"]
Scores = Float[Array, " n"]


def count(text: str) -> int:
    """Entries from "4096", "64K" or "16M".

    Raises:
      argparse.ArgumentTypeError: anything else, and zero.
    """
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of entries; write it like 4096, 64K or 16M"
        )
    return int(found[1]) * SUFFIXES[found[2]]


def named(entries: int) -> str:
    """The inverse of `count`, as short as it can be."""
    for suffix, unit in reversed(SUFFIXES.items()):
        if entries % unit == 0:
            return f"{entries // unit}{suffix}"
    raise AssertionError("every number is a multiple of one")


def one_pass(scores: Scores, k: int) -> Any:
    """What a threshold search repeats: how many entries reach a threshold."""
    return jnp.sum(scores >= SHARE, dtype=jnp.int32) - k


def by_counting(scores: Scores, k: int) -> Mask:
    """The library's selection."""
    return tk.top_k(scores, k)


def by_sorting(scores: Scores, k: int) -> Mask:
    """A threshold from the sorted entries."""
    return scores >= jnp.sort(scores)[scores.size - k]


def by_lax(scores: Scores, k: int) -> Mask:
    """A threshold from the k largest entries."""
    return scores >= jax.lax.top_k(scores, k)[0][-1]


def at_random(scores: Scores, k: int) -> Mask:
    """As many entries, drawn."""
    return tk.random_k(jax.random.key(1), k, scores.shape)


def measure(entries: int, repeats: int, lax_up_to: int) -> list[str]:
    """One row of the table.

    Args:
      entries: size of the array.
      repeats: rounds.
      lax_up_to: largest size that jax.lax.top_k is tried on.
    """
    k = max(1, round(SHARE * entries))
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (entries,)))
    runs: dict[str, Callable[[Scores, int], Any]] = {
        PASS: one_pass,
        COUNTING: by_counting,
        RANDOM: at_random,
        SORT: by_sorting,
    }
    if entries <= lax_up_to:
        runs[LAX] = by_lax

    def contestant(run: Callable[[Scores, int], Any]) -> timing.Contestant:
        jitted = jax.jit(run, static_argnums=1)
        return timing.Contestant(lambda: jitted(scores, k))

    contest = timing.in_turns({n: contestant(r) for n, r in runs.items()}, repeats)
    cells = [named(entries), f"{1e3 * contest.median(COUNTING):.1f}"]
    cells.append(f"{contest.ratio(COUNTING, to=PASS):.0f}")
    for name in (RANDOM, SORT, LAX):
        known = name in runs
        cells.append(f"{contest.ratio(name, to=COUNTING):.2f}" if known else SKIPPED)
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select")
    parser.add_argument("--sizes", default="1M,4M,16M,64M", help="numbers of entries")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--lax-up-to",
        type=count,
        default="4M",
        help="jax.lax.top_k is skipped above this size: on CPU it takes seconds",
    )
    parser.add_argument("--quick", action="store_true", help="one small size, 2 rounds")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} must be at least 1")
    try:
        sizes = [count(size) for size in args.sizes.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--sizes: {error}")
    if args.quick:
        sizes, args.repeats = [2**16], 2
    rows = [measure(size, args.repeats, args.lax_up_to) for size in sizes]
    header = ["entries", f"{COUNTING}, ms", f"{COUNTING} / pass"]
    header += [f"{name} / {COUNTING}" for name in (RANDOM, SORT, LAX)]
    print(f"The largest {SHARE:.0%} of float32 entries, median of {args.repeats}:\n")
    print(timing.table(header, rows))
    print(f"\npass = {PASS}; K = 2^10, M = 2^20")
    if args.lax_up_to < max(sizes):
        print(f"{LAX} was {SKIPPED} above {named(args.lax_up_to)} entries")
    print(timing.hardware())


if __name__ == "__main__":
    main()
