"""Trains a decoder larger than the device: B on the device, theta on the host.

    python -m benchmarks.largest --layers=5 --width=4096
    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python -m benchmarks.largest --layers=25 \\
        --width=8192 --theta=bfloat16
    python -m benchmarks.largest --search --width=8192
    python -m benchmarks.largest --quick

The network is `benchmarks.decoder` on the bytes of Tiny Shakespeare, with Top-KAST and
Adam; every kernel of every layer is a parameter of its own, made, selected and refreshed
by itself, so that nothing dense is ever larger than one of them. Prints the bytes that
this takes and those that are there, and stops where it does not fit; then trains with at
least one refresh.

With `--theta=bfloat16` the reservoir is kept so, and so are the values of B that the
network multiplies with; B is trained in float32 all the same, in a copy that the
optimizer keeps (`benchmarks.mixed`).
"""

import argparse
import pathlib
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import topkast_jax as tk
from benchmarks import decoder, fit, mixed, timing
from benchmarks.layouts import pair
from experiments import budget as budgets

PyTree = Any
ADVICE = (
    "take fewer layers, a larger sparsity, --theta=bfloat16, or map theta into files "
    "with --reservoir=FOLDER"
)
TEXT = pathlib.Path(__file__).parents[1] / "experiments/data/texts/tiny_shakespeare.txt"


class Setting(NamedTuple):
    """What is trained, and how.

    Attributes:
      layers, width: of the network.
      sparsities: forward, backward.
      layout: "packed" (unstructured) or "block".
      side: of a block.
      theta: dtype in which parameters are stored.
      dtype: of products and activations.
      rows, segment: of a batch; bytes.
      every: steps from refresh to refresh.
      rate: of Adam.
    """

    layers: int
    width: int
    sparsities: tuple[float, float]
    layout: Any
    side: int
    theta: Any
    dtype: Any
    rows: int
    segment: int
    every: int
    rate: float


def shapes(setting: Setting) -> PyTree:
    """Parameters of the dense network, a kernel of a layer at a time."""

    def stored(shape: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, setting.theta)

    one = jax.tree.map(stored, decoder.layer_shapes(setting.width))
    layers = [one] * setting.layers
    return {"layers": layers, "embedding": decoder.embedding_shape(setting.width)}


def initial(setting: Setting) -> PyTree:
    """Normal, of variance 1 / inputs (width for the embedding); for `tk.start`."""
    leaves, treedef = jax.tree.flatten(shapes(setting))
    made = []
    for i, leaf in enumerate(leaves):
        key = jax.random.fold_in(jax.random.key(0), i)
        inputs = setting.width if leaf.shape[0] == decoder.BYTES else leaf.shape[0]
        made.append(jax.random.normal(key, leaf.shape, leaf.dtype) * inputs**-0.5)
    return treedef.unflatten(made)


def transformation(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Adam under Top-KAST, in float32."""
    units = tk.unstructured
    if setting.layout == "block":
        units = tk.blocks(setting.side, setting.side)
    method = tk.top_kast(
        *setting.sparsities, refresh=tk.every(setting.every), structure=units
    )
    inner: Any = optax.adam(setting.rate)
    if setting.theta != jnp.float32:
        inner = mixed.in_float32(inner)
    return tk.sparse(inner, method, layout=setting.layout)


def compile_step(setting: Setting, tx: Any) -> jax.stages.Compiled:
    """(theta, opt_state, text) -> (loss, theta, opt_state), from shapes alone."""

    @jax.checkpoint
    def one(own: PyTree, marks: tk.Masks, x: jax.Array) -> jax.Array:
        return decoder.layer(tk.sparsify(own, marks), x)

    def step(theta: PyTree, opt_state: PyTree, text: jax.Array) -> Any:
        masks = tk.masks(opt_state)

        def loss(theta: PyTree) -> jax.Array:
            def through(x: jax.Array) -> jax.Array:
                for i, own in enumerate(theta["layers"]):
                    marks = (m and m["layers"][i] for m in masks)
                    x = one(own, tk.Masks(*marks), x)
                return x

            return decoder.loss(theta["embedding"], text, through, setting.dtype)

        value, gradients = jax.value_and_grad(loss)(theta)
        updates, opt_state = tx.update(gradients, opt_state, theta)
        return value, optax.apply_updates(theta, updates), opt_state

    theta, opt_state = tk.shapes(tx, shapes(setting))
    text = jax.ShapeDtypeStruct((setting.rows, setting.segment + 1), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(theta, opt_state, text).compile()


def planned(program: jax.stages.Compiled) -> int:
    """Bytes of a step, by XLA's own analysis."""
    found: Any = program.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def budget(setting: Setting, step: float) -> budgets.Budget:
    """Of a setting whose step takes so many bytes."""
    dense, tx = shapes(setting), transformation(setting)
    return budgets.budget(dense, *tk.shapes(tx, dense), int(step))


def search(setting: Setting, there: budgets.Room) -> Setting:
    """With the largest number of layers whose budget fits, to 1 % or one layer.

    Two small programs tell the bytes of a step with more layers.

    Raises:
      ValueError: none fits.
    """

    def of(layers: int) -> Setting:
        return setting._replace(layers=layers)

    def bytes_of(layers: int) -> float:
        return planned(compile_step(of(layers), transformation(of(layers))))

    few, more = (bytes_of(layers) for layers in (2, 4))
    each = (more - few) / 2

    def share(layers: int) -> float | None:
        need = budget(of(layers), few + each * (layers - 2))
        try:
            budgets.require(need, there, ADVICE)
        except ValueError:
            return None
        return 1.0

    most = 1
    while share(most):
        most *= 2
    found = fit.largest(most, share)
    if not found:
        raise ValueError("--search: not even one layer fits; take a smaller --width")
    return of(found)


def train(
    setting: Setting,
    tx: Any,
    program: jax.stages.Compiled,
    steps: int,
    reservoir: str | None,
) -> None:
    """Trains, and tells of it as it goes.

    Raises:
      RuntimeError: the loss does not fall.
    """
    began = time.perf_counter()
    theta, opt_state, store = tk.start(
        tx, lambda: initial(setting), reservoir=reservoir
    )
    _tell(f"start {time.perf_counter() - began:.1f} s")
    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    draws = np.random.default_rng(0)
    losses, times = [], []
    for step in range(steps):
        if step and tk.due(tx, step):
            began = time.perf_counter()
            theta, opt_state, store = tk.refresh(tx, theta, opt_state, store)
            jax.block_until_ready(theta)
            _tell(f"step {step}: a refresh {time.perf_counter() - began:.1f} s")
        at = draws.integers(0, len(text) - setting.segment, setting.rows)
        batch = text[at[:, None] + np.arange(setting.segment + 1)].astype(np.int32)
        began = time.perf_counter()
        loss, theta, opt_state = program(theta, opt_state, batch)
        losses.append(float(loss))
        times.append(time.perf_counter() - began)
    few = max(1, steps // 5)
    first, last = (statistics.mean(part) for part in (losses[:few], losses[-few:]))
    _tell(f"a step {statistics.median(times):.2f} s")
    _tell(
        f"loss {losses[0]:.3f} at first; mean of the first {few} steps {first:.3f}, of "
        f"the last {few} of {steps} {last:.3f} nats a byte"
    )
    _tell(f"peak of the process {budgets.size(_peak())}")
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        _tell(f"peak of the device {budgets.size(stats['peak_bytes_in_use'])}")
    if not last < first:
        raise RuntimeError("the loss does not fall")


def _tell(line: str) -> None:
    print(f"  {line}", flush=True)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: Sequence[str] | None = None) -> None:
    """Budgets, trains and prints; `argv` without the name of the program."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest")
    add: Any = parser.add_argument
    add("--layers", type=int, default=5)
    add("--width", type=int, default=4096)
    add("--sparsities", type=pair, default=(0.98, 0.95), help="98/95")
    add("--layout", default="block", choices=("block", "packed"))
    add("--side", type=int, default=128, help="of a block")
    add("--theta", default="float32", choices=("float32", "bfloat16"))
    add("--dtype", default="float32" if cpu else "bfloat16", help="of products")
    add("--rows", type=int, default=1)
    add("--segment", type=int, default=256 if cpu else 1024, help="bytes of a row")
    add("--steps", type=int, default=30)
    add("--every", type=int, default=20, help="steps from refresh to refresh")
    add("--rate", type=float, default=1e-3, help="learning rate")
    add("--reservoir", default=None, help="folder of a mapped theta; else in memory")
    add("--search", action="store_true", help="the most layers that fit")
    add("--budget", action="store_true", help="stop before training")
    add("--quick", action="store_true", help="a tiny network")
    args = parser.parse_args(argv)
    if args.quick:
        args.layers, args.width, args.side, args.segment = 2, 128, 16, 64
        args.sparsities, args.steps, args.every = (0.9, 0.8), 10, 5
    least = {"layers": 1, "rows": 1, "every": 1, "segment": 2, "width": 1, "side": 1}
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            parser.error(f"--{name}={getattr(args, name)} must be at least {smallest}")
    if args.width % min(args.width, decoder.HEAD):
        parser.error(f"--width={args.width} is no multiple of {decoder.HEAD}")
    if args.steps <= args.every:
        parser.error(
            f"--steps={args.steps} must exceed --every={args.every}: a refresh"
        )
    setting = Setting(
        args.layers,
        args.width,
        args.sparsities,
        args.layout,
        args.side,
        jnp.dtype(args.theta),
        jnp.dtype(args.dtype),
        args.rows,
        args.segment,
        args.every,
        args.rate,
    )
    there = budgets.room(args.reservoir)
    if args.search:
        try:
            setting = search(setting, there)
        except ValueError as error:
            parser.error(str(error))
    tx = transformation(setting)
    program = compile_step(setting, tx)
    there = budgets.room(args.reservoir)  # with the compiled program
    need = budget(setting, planned(program))
    weights = sum(x.size for x in jax.tree.leaves(shapes(setting)))
    forward, backward = (f"{100 * s:g}" for s in setting.sparsities)
    units = f"{setting.side}x{setting.side}" if setting.layout == "block" else "entries"
    print(
        f"{setting.layers} layers of {setting.width}: {weights / 1e9:.3f} 10^9 weights if "
        f"dense; Top-KAST {forward}/{backward}, {setting.layout} ({units}), theta in "
        f"{setting.theta.name}, products in {setting.dtype.name}, batch {setting.rows} x "
        f"{setting.segment}\n"
        f"  dense with gradient and Adam, float32{budgets.size(16 * weights):>12}\n"
        f"{budgets.table(need, there)}",
        flush=True,
    )
    try:
        budgets.require(need, there, ADVICE)
    except ValueError as error:
        parser.error(str(error))
    if not args.budget:
        train(setting, tx, program, args.steps, args.reservoir)
        print(timing.hardware())


if __name__ == "__main__":
    main()
