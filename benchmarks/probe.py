"""Bytes of `tk.probe`: one parameter at a time, and all at once.

    python -m benchmarks.probe
    python -m benchmarks.probe --quick

RigL in the packed layout needs the gradient of absent entries once per refresh. A row
shows what XLA plans (arguments + temporaries + outputs - aliases) for the largest of the
programs that `tk.probe` compiles, one for each parameter, for one program that does the
same for all, and for an ordinary packed step, each against the dense step.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import optax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.layouts import Training, Way
from benchmarks.problems import PROBLEMS, Problem

PyTree = Any


def planned(compiled: Any) -> int:
    """Bytes by XLA's own analysis."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def measure(name: str, problem: Problem) -> list[str]:
    """One row of the table."""
    dense = Training(problem, None, (0.9, 0.9)).planned
    step = Training(problem, Way("packed", tk.unstructured), (0.9, 0.9)).planned
    method = tk.rigl(0.9, refresh=tk.every(100))
    tx = tk.sparse(
        optax.adam(1e-3), method, layout="packed", axes=tk.axes(problem.axes)
    )
    theta, opt_state, _ = tk.start(tx, problem.params)

    def loss(theta: PyTree, opt_state: PyTree, carry: PyTree) -> jax.Array:
        alpha = tk.sparsify(theta, tk.masks(opt_state), expanded=False)
        return problem.loss(alpha, carry)[0]

    def one(i: int, index: Any, theta: PyTree, opt_state: PyTree, carry: PyTree) -> Any:
        return tk.probe_leaf(
            loss, i, theta, opt_state, index, jax.random.key(0), (carry,)
        )

    def found(theta: PyTree, opt_state: PyTree, carry: PyTree, only: Any) -> list[Any]:
        masks = tk.masks(opt_state).forward
        leaves = jax.tree.leaves(theta)
        indices = jax.tree.structure(theta).flatten_up_to(masks)
        wanted = [i for i in range(len(leaves)) if indices[i] is not None]
        return [
            one(i, indices[i], theta, opt_state, carry)
            for i in wanted
            if only in (None, i)
        ]

    def bytes_of(only: int | None) -> int:
        jitted = jax.jit(found, static_argnums=3)
        return planned(jitted.lower(theta, opt_state, problem.carry, only).compile())

    count = len(jax.tree.leaves(theta))
    each, at_once = max(map(bytes_of, range(count))), bytes_of(None)
    return [name, *(f"{size / dense:.2f}" for size in (step, each, at_once))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe")
    parser.add_argument("--sizes", default="mlp-8192,unrolled,transformer-small")
    parser.add_argument("--quick", action="store_true", help="tiny model")
    args = parser.parse_args(argv)
    sizes = ["tiny"] if args.quick else args.sizes.split(",")
    for name in sizes:
        if name not in PROBLEMS:
            parser.error(f"--sizes: {name!r} is not one of {', '.join(PROBLEMS)}")
    rows = [measure(name, PROBLEMS[name]()) for name in sizes]
    header = [
        "bytes / dense step",
        "packed step",
        "probe, one at a time",
        "all at once",
    ]
    print(f"RigL, 90 %, Adam\n\n{timing.table(header, rows)}\n\n{timing.hardware()}")


if __name__ == "__main__":
    main()
