"""Seeds as replicas under one vmap, against the same steps one after the other.

    python -m benchmarks.replicas
    python -m benchmarks.replicas --quick

Whole train steps of the quickstart's Transformer-XL, AdamW, dense and Top-KAST in the
masked layout. "one vmap / one by one" below 1 says that training seeds together is
faster than in turns. On a CPU with several cores there is a third way, a process a core,
which is what `experiments.sweep` does when it is started several times.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.problems import PROBLEMS, Problem

PyTree = Any


class Replicas:
    """States of several seeds, and the step that replaces them."""

    def __init__(
        self, problem: Problem, method: tk.Method | None, seeds: int, *, mapped: bool
    ) -> None:
        tx: Any = optax.adamw(1e-3)
        if method is not None:
            tx = tk.sparse(tx, method, axes=tk.axes(problem.axes))

        def step(state: PyTree) -> PyTree:
            params, opt_state, carry = state

            def objective(theta: PyTree) -> Any:
                if method is not None:
                    theta = tk.sparsify(theta, tk.masks(opt_state))
                return problem.loss(theta, carry)

            grads, carry_ = jax.grad(objective, has_aux=True)(params)
            updates, opt_state_ = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state_, carry_

        def start(scale: jax.Array) -> PyTree:
            params = jax.tree.map(lambda x: x * scale, problem.params)
            return params, tx.init(params), problem.carry

        scales = 1 + jnp.arange(seeds) / 100  # replicas that differ
        self.mapped = mapped
        if mapped:
            self._step = jax.jit(jax.vmap(step), donate_argnums=0)
            self._states = [jax.jit(jax.vmap(start))(scales)]
        else:
            self._step = jax.jit(step, donate_argnums=0)
            self._states = [jax.jit(start)(scale) for scale in scales]

    def run(self) -> None:
        """One step of every seed."""
        self._states = [jax.block_until_ready(self._step(s)) for s in self._states]


def report(problem: Problem, seeds: int, rounds: int) -> str:
    """Measures; title line and table."""
    ways: dict[str, tk.Method | None] = {
        "dense": None,
        "Top-KAST 90/80": tk.top_kast(0.9, 0.8, refresh=tk.every(100)),
    }
    made = {
        (name, mapped): Replicas(problem, method, seeds, mapped=mapped)
        for name, method in ways.items()
        for mapped in (False, True)
    }
    contest = timing.in_turns(
        {f"{name} {mapped}": timing.Contestant(r.run) for (name, mapped), r in made.items()},
        rounds,
    )  # fmt: skip
    rows = [
        [
            name,
            f"{1e3 * contest.median(f'{name} False') / seeds:.1f}",
            f"{contest.ratio(f'{name} True', to=f'{name} False'):.2f}",
        ]
        for name in ways
    ]
    header = ["step", "one, ms", "one vmap / one by one"]
    return f"{problem.title}, {seeds} seeds\n\n{timing.table(header, rows)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas")
    parser.add_argument("--seeds", type=int, default=3, help="replicas")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 rounds")
    args = parser.parse_args(argv)
    if min(args.seeds, args.repeats) < 1:
        parser.error("--seeds and --repeats must be at least 1")
    problem = PROBLEMS["tiny" if args.quick else "transformer-small"]()
    print(report(problem, args.seeds, 2 if args.quick else args.repeats))
    print(timing.hardware())


if __name__ == "__main__":
    main()
