"""Whole train steps of sparse methods, masked layout, against the dense step.

    python -m benchmarks.step
    python -m benchmarks.step --sizes=mlp-4096 --repeats=9
    python -m benchmarks.step --quick

A step is loss, gradient, update and apply in one jit with donated state, AdamW. A step
that refreshes the masks is timed apart from one that does not, by setting the step
number in the state; a step of the same variant goes before each, untimed, so that
caches are as in training. "amortised" is what N steps cost with one refresh among them.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.problems import PROBLEMS, Problem

PyTree = Any
DENSE, AGAIN = "dense", "dense, again"


class Variant(NamedTuple):
    """A row of the table: a method and the step that refreshes its masks.

    Attributes:
      method: None is dense.
      every: steps from one refresh to the next; with 1 there are no others.
    """

    method: tk.Method | None
    every: int = 1


def variants(every: int, only: str = "") -> dict[str, Variant]:
    """What is compared, the dense step first, twice: the second shows the noise.

    Args:
      every: N, steps from one refresh to the next.
      only: leave out the methods without it in their name.
    """

    def top_kast(n: int) -> Variant:
        return Variant(tk.top_kast(0.9, 0.8, refresh=tk.every(n)), n)

    methods = {
        f"Top-KAST 90/80, every {every}": top_kast(every),
        "Top-KAST 90/80, every step": top_kast(1),
        f"RigL 90, every {every}": Variant(
            tk.rigl(0.9, refresh=tk.every(every)), every
        ),
    }
    chosen = {name: v for name, v in methods.items() if only in name}
    return {DENSE: Variant(None), AGAIN: Variant(None), **chosen}


class Training:
    """A state that jitted, donating steps replace."""

    def __init__(self, problem: Problem, method: tk.Method | None) -> None:
        tx = optax.adamw(1e-3)
        if method is not None:
            tx = tk.sparse(tx, method, axes=tk.axes(problem.axes))

        def step(params: PyTree, opt_state: PyTree, carry: PyTree) -> Any:
            def objective(theta: PyTree) -> Any:
                if method is not None:
                    theta = tk.sparsify(theta, tk.masks(opt_state))
                return problem.loss(theta, carry)

            (loss, carry_), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, opt_state_ = tx.update(grads, opt_state, params)
            return loss, (optax.apply_updates(params, updates), opt_state_, carry_)

        self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        params, carry = jax.tree.map(jnp.copy, (problem.params, problem.carry))
        self._state = (params, jax.jit(tx.init)(params), carry)

    @property
    def opt_state(self) -> PyTree:
        """Of the optimizer, as the next step will read it."""
        return self._state[1]

    def step(self) -> None:
        """Makes one step and waits for all of it."""
        _, self._state = self._step(*self._state)
        jax.block_until_ready(self._state)

    def before(self, step: int | None) -> None:
        """Makes one step, so that the next one is number `step`."""
        if step is not None:
            params, opt_state, carry = self._state
            opt_state = opt_state._replace(sparse_step=jnp.int32(step - 1))
            self._state = params, opt_state, carry
        self.step()


def contestants(
    problem: Problem, rows: Mapping[str, Variant]
) -> dict[str, timing.Contestant]:
    """What to time, by the name of its row and whether it refreshes."""
    found = {}
    for name, variant in rows.items():
        training = Training(problem, variant.method)

        def timed(step: int | None, training: Training = training) -> Any:
            return timing.Contestant(training.step, lambda: training.before(step))

        if variant.method is None:
            found[name] = timed(None)
            continue
        # Update n makes the masks of step n + 1, so every - 1 is the one that refreshes.
        found[f"{name} refresh"] = timed(max(variant.every - 1, 1))
        if variant.every > 1:
            found[f"{name} ordinary"] = timed(1)
    return found


def report(problem: Problem, chosen: Mapping[str, Variant], repeats: int) -> str:
    """Measures a problem; its title line and table of ratios to the dense step.

    Args:
      problem: what is trained.
      chosen: the rows, see `variants`.
      repeats: rounds.
    """
    contest = timing.in_turns(contestants(problem, chosen), repeats)
    rows = []
    for name, variant in list(chosen.items())[1:]:
        if variant.method is None:
            rows.append([name, f"{contest.ratio(name, to=DENSE):.2f}", "", ""])
            continue
        refresh = contest.ratio(f"{name} refresh", to=DENSE)
        if variant.every == 1:
            rows.append([name, "", f"{refresh:.2f}", f"{refresh:.2f}"])
            continue
        ordinary = contest.ratio(f"{name} ordinary", to=DENSE)
        amortised = (ordinary * (variant.every - 1) + refresh) / variant.every
        rows.append([name, *(f"{x:.2f}" for x in (ordinary, refresh, amortised))])
    header = ["time / dense", "ordinary step", "refresh step", "amortised"]
    dense = 1e3 * contest.median(DENSE)
    size = sum(leaf.size for leaf in jax.tree.leaves(problem.params)) / 1e6
    title = f"{problem.title}, {size:.1f}M parameters: dense {dense:.1f} ms"
    return f"{title}\n\n{timing.table(header, rows)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    parser.add_argument(
        "--sizes",
        default="mlp-4096,transformer-small,transformer",
        help=f"comma separated, of {', '.join(PROBLEMS)}",
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--every", type=int, default=100, help="refresh interval N")
    parser.add_argument("--only", default="", help="methods with this in their name")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 rounds")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} must be at least 1")
    if args.every < 4:
        parser.error(
            f"--every={args.every} must be at least 4, else no step lies between two "
            "refreshes"
        )
    sizes = ["tiny"] if args.quick else args.sizes.split(",")
    for name in sizes:
        if name not in PROBLEMS:
            parser.error(f"--sizes: {name!r} is not one of {', '.join(PROBLEMS)}")
    chosen = variants(args.every, args.only)
    if len(chosen) == 2:
        known = ", ".join(list(variants(args.every))[2:])
        parser.error(f"--only={args.only} is in the name of none of {known}")
    repeats = 2 if args.quick else args.repeats
    print(f"Masked layout: gains in FLOPs are simulated. Medians of {repeats}.\n")
    for name in sizes:
        print(report(PROBLEMS[name](), chosen, repeats), flush=True)
    print(timing.hardware())


if __name__ == "__main__":
    main()
