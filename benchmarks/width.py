"""Cost against width at a constant number of weights: SET on blocks, nothing dense.

    python -m benchmarks.width
    python -m benchmarks.width --quick

A square layer [width, width] keeps the same number of blocks at every width, so that it
is sparser the wider it is. It is started from its shape alone, trained with Adam on a
batch of 64, and refreshed. The last column is what the dense layer with its gradient
and moments would take; `peak` is the largest resident set of this process so far.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from benchmarks import timing

SIDE, ROWS = 128, 64


def measure(width: int, blocks: int, repeats: int) -> list[str]:
    """One row of the table."""
    sparsity = 1 - blocks * SIDE**2 / width**2
    method = tk.set_(sparsity, refresh=tk.every(1), structure=tk.blocks(SIDE, SIDE))
    tx = tk.sparse(optax.adam(1e-3), method, layout="block")
    shape: Any = jax.ShapeDtypeStruct((width, width), jnp.float32)
    began = time.perf_counter()
    theta, opt_state, store = tk.start(tx, {"kernel": shape})
    start = time.perf_counter() - began
    x = jax.random.normal(jax.random.key(0), (width, ROWS))

    def step(theta: Any, opt_state: Any) -> Any:
        def loss(theta: Any) -> Any:
            alpha = tk.sparsify(theta, tk.masks(opt_state))
            y = tk.ops.sparse_matmul(x, alpha["kernel"], features_first=True)
            return jnp.mean((y - x) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(theta), opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state

    compiled = jax.jit(step).lower(theta, opt_state).compile()
    state = [(theta, opt_state)]

    def run() -> Any:
        state[0] = compiled(*state[0])
        return state[0]

    def renew() -> Any:
        theta, opt_state, _ = tk.refresh(tx, *state[0], store)
        state[0] = (theta, opt_state)
        return state[0]

    renew()
    contest = timing.in_turns(
        {"step": timing.Contestant(run), "refresh": timing.Contestant(renew)}, repeats
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state[0])) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        f"{width}",
        f"{100 * sparsity:.4g} %",
        f"{1e3 * start:.0f}",
        f"{1e3 * contest.median('step'):.1f}",
        f"{1e3 * contest.median('refresh'):.0f}",
        f"{held:.1f}",
        f"{peak:.2f}",
        f"{4 * 4 * width**2 / 2**30:.1f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.width")
    parser.add_argument("--widths", default="1024,2048,4096,8192,16384,32768,45056")
    parser.add_argument("--blocks", type=int, default=60, help="of 128 x 128")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--quick", action="store_true", help="small widths, 1 round")
    args = parser.parse_args(argv)
    try:
        widths = [int(width) for width in args.widths.split(",")]
    except ValueError:
        parser.error(f"--widths={args.widths} is no list of numbers")
    if args.quick:
        widths, args.blocks, args.repeats = [256, 512], 3, 1
    for width in widths:
        if width % SIDE or not 0 < args.blocks <= (width // SIDE) ** 2:
            parser.error(
                f"--widths: {width} is no multiple of {SIDE} that has room for "
                f"--blocks={args.blocks}"
            )
    rows = [measure(width, args.blocks, args.repeats) for width in widths]
    header = ["width", "sparsity", "start, ms", "step, ms", "refresh, ms",
              "state, MiB", "peak, GiB", "dense, GiB"]  # fmt: skip
    print(f"{args.blocks} blocks of {SIDE} x {SIDE}, batch {ROWS}\n")
    print(timing.table(header, rows))
    print(f"\n{timing.hardware()}")


if __name__ == "__main__":
    main()
