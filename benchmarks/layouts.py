"""Whole train steps in every layout against the dense step: time, bytes, refresh.

    python -m benchmarks.layouts
    python -m benchmarks.layouts --sizes=mlp-8192 --sparsities=90/80 --repeats=9
    python -m benchmarks.layouts --dtype=bfloat16 --sizes=mlp-32768
    python -m benchmarks.layouts --quick

A step is loss, gradient, Adam and apply in one jit with donated state; Top-KAST at the
given forward/backward sparsities. With `--dtype=bfloat16` products and activations are in
bfloat16, dense ones too; parameters, gradients of them, and Adam stay float32. Columns,
all but the first ratios to dense:

    FLOPs     analytic, (2 forward + backward) / 3 of the products with weights
    time      of a step without refresh
    refresh   of `tk.refresh` (packed, block) or of a step that refreshes (masked), in
              dense steps
    resident  bytes of parameters, masks or positions, and optimizer state on the device
    + scratch those and what XLA plans beside them (arguments + temporaries + outputs
              - aliases)
    host      bytes of the reservoir in host memory, against the dense parameters

The row "floor" is the same dense step without its projections: no kernels, no products
with them, each layer's input repeated or cut to the shape of its output.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.problems import PROBLEMS, Problem, in_dtype

PyTree = Any
EVERY = 100


class Way(NamedTuple):
    """A row of the table: where the weights live and which pattern they have."""

    layout: Any
    structure: tk.Structure

    @property
    def name(self) -> str:
        return f"{self.layout}, {self.structure.name}"


WAYS = [
    Way("masked", tk.unstructured),
    Way("packed", tk.unstructured),
    Way("block", tk.unstructured),
    Way("block", tk.fan_in(1, 256)),
    Way("block", tk.blocks(128, 128)),
    Way("block", tk.blocks(256, 256)),
]


class Training:
    """A state that a compiled, donating step replaces.

    Args:
      problem: what is trained.
      way: layout and structure; None for dense.
      sparsities: forward, backward.
      dtype: of products and activations.
    """

    def __init__(
        self,
        problem: Problem,
        way: Way | None,
        sparsities: tuple[float, float],
        dtype: Any = jnp.float32,
    ) -> None:
        tx: Any = optax.adam(1e-3)
        params = jax.tree.map(jnp.copy, problem.params)
        carry = in_dtype(jax.tree.map(jnp.copy, problem.carry), dtype)
        self.store: tk.Store | None = None
        if way is None:
            opt_state = tx.init(params)
        else:
            method = tk.top_kast(
                *sparsities, refresh=tk.every(EVERY), structure=way.structure
            )
            axes = tk.axes(problem.axes)
            tx = tk.sparse(tx, method, layout=way.layout, axes=axes)
            if way.layout == "masked":
                opt_state = jax.jit(tx.init)(params)
            else:
                params, opt_state, self.store = tk.start(tx, params)
        self.tx, self.way = tx, way

        def step(params: PyTree, opt_state: PyTree, carry: PyTree) -> Any:
            def objective(theta: PyTree) -> Any:
                alpha = theta
                if way is not None:
                    alpha = tk.sparsify(
                        theta, tk.masks(opt_state), expanded=way.layout == "masked"
                    )
                return problem.loss(in_dtype(alpha, dtype), carry)

            (loss, carry_), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, opt_state_ = tx.update(grads, opt_state, params)
            return loss, (optax.apply_updates(params, updates), opt_state_, carry_)

        jitted = jax.jit(step, donate_argnums=(0, 1, 2))
        self.compiled = jitted.lower(params, opt_state, carry).compile()
        self.state = (params, opt_state, carry)

    def step(self) -> None:
        """Makes one step and waits for all of it."""
        _, self.state = self.compiled(*self.state)
        jax.block_until_ready(self.state)

    def refresh(self) -> float:
        """Seconds of a refresh."""
        params, opt_state, carry = self.state
        if self.store is None:  # in the step before one is due
            self.state = (
                params,
                opt_state._replace(sparse_step=jnp.int32(EVERY - 1)),
                carry,
            )
        began = time.perf_counter()
        if self.store is None:
            self.step()
        else:
            params, opt_state, _ = tk.refresh(self.tx, params, opt_state, self.store)
            self.state = (params, opt_state, carry)
            jax.block_until_ready(self.state)
        return time.perf_counter() - began

    @property
    def resident(self) -> int:
        """Bytes of parameters, masks or positions, and optimizer state."""
        return sum(x.nbytes for x in jax.tree.leaves(self.state[:2]))

    @property
    def planned(self) -> int:
        """Bytes of a step, by XLA's own analysis."""
        found: Any = self.compiled.memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
        )


def fraction(problem: Problem, training: Training) -> float:
    """Analytic FLOPs of the products with weights, against dense."""
    masks = tk.dense_masks(training.state[1])
    return tk.metrics.flops(problem.params, masks, problem.uses).fraction


def report(
    problem: Problem,
    sparsities: tuple[float, float],
    ways: Sequence[Way],
    repeats: int,
    dtype: Any = jnp.float32,
) -> str:
    """Measures a problem at one pair of sparsities; its title line and table."""
    dense = Training(problem, None, sparsities, dtype)
    trainings: dict[str, Training] = {"dense": dense, "dense, again": dense}
    if problem.floor is not None:
        trainings["floor"] = Training(problem.floor, None, sparsities, dtype)
    trainings |= {way.name: Training(problem, way, sparsities, dtype) for way in ways}
    contestants = {n: timing.Contestant(t.step) for n, t in trainings.items()}
    contest = timing.in_turns(contestants, repeats)
    second = contest.median("dense")
    weights = sum(x.nbytes for x in jax.tree.leaves(problem.params))
    rows = []
    for name, training in list(trainings.items())[1:]:
        row = [name, "", f"{contest.ratio(name, to='dense'):.2f}", "", "", "", ""]
        row[4] = f"{training.resident / dense.resident:.2f}"
        row[5] = f"{training.planned / dense.planned:.2f}"
        if training.way is not None:
            training.refresh()  # compiles
            host = training.store.nbytes / weights if training.store else 0
            row[1] = f"{fraction(problem, training):.2f}"
            row[3] = f"{training.refresh() / second:.2f}"
            row[6] = f"{host:.2f}"
        rows.append(row)
    header = ["/ dense", "FLOPs", "time", "refresh", "resident", "+ scratch", "host"]
    forward, backward = (f"{100 * s:g}" for s in sparsities)
    title = (
        f"{problem.title}, {jnp.dtype(dtype).name}, Top-KAST {forward}/{backward}: "
        f"dense {1e3 * second:.1f} ms, "
        f"{dense.resident / 2**20:.0f} MiB resident, "
        f"{dense.planned / 2**20:.0f} MiB with scratch"
    )
    return f"{title}\n\n{timing.table(header, rows)}\n"


def pair(text: str) -> tuple[float, float]:
    """Reads "90/80"."""
    try:
        forward, backward = (float(part) / 100 for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no pair like 90/80") from None
    return forward, backward


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts")
    parser.add_argument(
        "--sizes",
        default="mlp-4096,mlp-8192",
        help=f"comma separated, of {', '.join(PROBLEMS)}",
    )
    parser.add_argument(
        "--sparsities",
        default="50/50,80/70,90/80,95/90,98/95",
        help="forward/backward in percent, comma separated",
    )
    parser.add_argument("--ways", default="", help="rows with this in their name")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of products and activations",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 rounds")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} must be at least 1")
    sizes = ["tiny"] if args.quick else args.sizes.split(",")
    for name in sizes:
        if name not in PROBLEMS:
            parser.error(f"--sizes: {name!r} is not one of {', '.join(PROBLEMS)}")
    ways = [way for way in WAYS if args.ways in way.name]
    if not ways:
        known = "; ".join(way.name for way in WAYS)
        parser.error(f"--ways={args.ways} is in the name of none of {known}")
    pairs: Mapping[str, tuple[float, float]]
    try:
        pairs = {text: pair(text) for text in args.sparsities.split(",")}
    except argparse.ArgumentTypeError as error:
        parser.error(f"--sparsities: {error}")
    if args.quick:
        pairs = {"90/80": (0.9, 0.8)}
    repeats = 2 if args.quick else args.repeats
    print(f"Medians of {repeats} rounds.\n")
    for name in sizes:
        problem = PROBLEMS[name]()
        for sparsities in pairs.values():
            found = report(problem, sparsities, ways, repeats, jnp.dtype(args.dtype))
            print(found, flush=True)
            jax.clear_caches()
    print(timing.hardware())


if __name__ == "__main__":
    main()
