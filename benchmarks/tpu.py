"""The largest Transformer that fits a TPU, dense and sparse, by the TPU's own compiler.

    pip install libtpu
    python -m benchmarks.tpu
    python -m benchmarks.tpu --quick

Runs on any CPU: whole train steps are compiled ahead of time for real topologies, and no
array is made. A byte-level decoder of equal layers (attention and feed-forward, 12 width^2
weights a layer, float32 weights and Adam, bfloat16 products), scanned with remat; Top-KAST
at the given forward/backward sparsities. Over several chips (FSDP) every weight is cut,
and gathered layer by layer as it is stored. For each chip and way the number of layers is
raised to the largest with which the step still compiles.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from benchmarks import timing
from experiments import aot

PyTree = Any
BYTES, SEGMENT, AXIS = 256, 1024, "fsdp"


class Chip(NamedTuple):
    """A row of the table: a topology, how many of its devices, and the width."""

    title: str
    topology: str
    devices: int
    width: int


class Way(NamedTuple):
    """A column: layout and sparsities; None for dense."""

    layout: Any = None
    forward: float = 0.0
    backward: float = 0.0

    @property
    def title(self) -> str:
        if self.layout is None:
            return "dense"
        return f"{self.layout} {100 * self.forward:g}/{100 * self.backward:g}"


CHIPS = [
    Chip("one v5e", "v5e:2x2", 1, 4096),
    Chip("v5e 16x16", "v5e:16x16", 256, 8192),
    Chip("one v5p", "v5p:2x2x1", 1, 4096),
]
WAYS = [
    Way(),
    Way("block", 0.9, 0.8),
    Way("block", 0.95, 0.9),
    Way("packed", 0.9, 0.8),
    Way("packed", 0.95, 0.9),
]


def shapes(layers: int, width: int) -> PyTree:
    """Parameters of the dense network."""

    def kernel(inputs: int, outputs: int) -> Any:
        return jax.ShapeDtypeStruct((layers, inputs, outputs), jnp.float32)

    stack = {
        "qkv": {"kernel": kernel(width, 3 * width)},
        "out": {"kernel": kernel(width, width)},
        "up": {"kernel": kernel(width, 4 * width)},
        "down": {"kernel": kernel(4 * width, width)},
    }
    embedding = jax.ShapeDtypeStruct((BYTES, width), jnp.float32)
    return {"layers": stack, "embedding": embedding}


def transformation(way: Way, devices: int) -> optax.GradientTransformation:
    """Adam, or Adam under Top-KAST."""
    if way.layout is None:
        return optax.adam(1e-4)
    units = tk.blocks(256, 32) if way.layout == "block" else tk.unstructured
    method = tk.top_kast(
        way.forward, way.backward, structure=tk.groups_of(devices, units)
    )
    axes = tk.axes({"layers/*": "s i o"})
    return tk.sparse(optax.adam(1e-4), method, layout=way.layout, axes=axes)


def product(x: jax.Array, kernel: Any) -> jax.Array:
    """In bfloat16, whichever form the kernel has."""
    if isinstance(kernel, tk.BlockMatrix):
        stored = tk.BlockMatrix(kernel.values.astype(x.dtype), kernel.index)
        return tk.ops.sparse_matmul(x, stored, "blocks")
    return x @ kernel.astype(x.dtype)


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without parameters."""
    return jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)


def layer(weights: PyTree, x: jax.Array) -> jax.Array:
    """One layer on [rows, SEGMENT, width]; 128 features a head."""
    rows, length, width = x.shape
    heads = product(norm(x), weights["qkv"]["kernel"])
    q, k, v = jnp.split(heads.reshape(rows, length, -1, 128), 3, axis=2)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + product(mixed.reshape(rows, length, width), weights["out"]["kernel"])
    inner = jax.nn.relu(product(norm(x), weights["up"]["kernel"]))
    return x + product(inner, weights["down"]["kernel"])


class Program(NamedTuple):
    """A compiled step: bytes of one device, and weights of the dense network."""

    bytes: int
    weights: int


def compile_step(chip: Chip, way: Way, layers: int, devices: Sequence[Any]) -> Program:
    """Compiles a train step.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit.
    """
    mesh = Mesh(list(devices[: chip.devices]), (AXIS,), axis_types=(AxisType.Auto,))
    dense = shapes(layers, chip.width)
    tx = transformation(way, chip.devices)
    cut = {
        "layers": jax.tree.map(
            lambda _: NamedSharding(mesh, P(None, None, AXIS)), dense["layers"]
        ),
        "embedding": NamedSharding(mesh, P()),
    }
    masks: Any = None
    if way.layout is None:
        theta, of_theta = dense, cut
        opt_state = jax.eval_shape(tx.init, dense)
    else:
        theta, opt_state = tk.shapes(tx, dense)
        masks = tk.masks(opt_state)
        of_theta = tk.packed_shardings(masks, cut)
    everywhere = NamedSharding(mesh, P())
    of_state = tk.state_shardings(opt_state, theta, of_theta, everywhere)
    rows = NamedSharding(mesh, P(AXIS))
    # Of one layer: the scan takes the stack axis off.
    of_layer = jax.tree.map(
        lambda s: NamedSharding(mesh, P(*s.spec[1:])), of_theta["layers"]
    )

    def local(theta: PyTree, masks: Any, text: jax.Array) -> Any:
        def loss(theta: PyTree) -> jax.Array:
            x = theta["embedding"].astype(jnp.bfloat16)[text[:, :-1]]
            stacked = masks and tk.Masks(*(m and m["layers"] for m in masks))

            @jax.checkpoint
            def body(x: jax.Array, operands: Any) -> tuple[jax.Array, None]:
                own, marks = operands
                none = jax.tree.map(lambda _: None, own)
                given = marks if masks else tk.Masks(none, none, none)
                whole, everything = tk.gather_groups(own, given, of_layer, (AXIS,))
                if masks:
                    expanded = way.layout == "packed"
                    whole = tk.sparsify(whole, everything, expanded=expanded)
                return layer(whole, x), None

            x, _ = jax.lax.scan(body, x, (theta["layers"], stacked))
            logits = norm(x) @ theta["embedding"].astype(x.dtype).T
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), text[:, 1:]
            )
            return jnp.mean(losses) / chip.devices

        gradients = jax.grad(loss)(theta)
        return tk.reduce_gradients(gradients, of_theta, (AXIS,))

    def step(theta: PyTree, opt_state: PyTree, text: jax.Array) -> Any:
        marks = None if way.layout is None else tk.masks(opt_state)
        of_masks = None
        if marks is not None:
            of_masks = tk.sharding_specs(tk.masks(of_state), (AXIS,))
        specs = tk.sharding_specs(of_theta, (AXIS,))
        gradients = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, of_masks, P(AXIS)),
            out_specs=specs,
            check_vma=False,
        )(theta, marks, text)
        updates, opt_state = tx.update(gradients, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state

    def placed(tree: PyTree, shardings: PyTree) -> PyTree:
        return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings)

    text = jax.ShapeDtypeStruct((chip.devices, SEGMENT + 1), jnp.int32, sharding=rows)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_theta, of_state))
    program = jitted.lower(
        placed(theta, of_theta), placed(opt_state, of_state), text
    ).compile()
    found: Any = program.memory_analysis()
    used = (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(dense))
    return Program(used, weights)


def largest(chip: Chip, way: Way, devices: Sequence[Any]) -> tuple[int, Program]:
    """The largest number of layers that fits, to 4 %, and its program.

    Bytes grow linearly with layers; so two small programs give a first guess, and
    compiling decides.
    """
    room = _capacity(chip)
    one, low = (compile_step(chip, way, n, devices) for n in (1, 2))
    each, layers, high = low.bytes - one.bytes, 2, 0
    while True:
        following = layers + int((room - low.bytes) / each)
        if high:  # known not to fit
            following = min(following, (layers + high) // 2)
        if following - layers < max(1, layers // 25):
            return layers, low
        try:
            found = compile_step(chip, way, following, devices)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            high = following
            continue
        each = (found.bytes - low.bytes) / (following - layers)
        layers, low = following, found


def _capacity(chip: Chip) -> float:
    """Bytes that a program may take on a chip, as the compiler says."""
    return (95.7 if "v5p" in chip.topology else 15.75) * 2**30


def report(chips: Sequence[Chip], ways: Sequence[Way]) -> str:
    """Table of the largest networks."""
    rows = []
    for chip in chips:
        devices, dense = aot.devices(chip.topology), 0
        for way in ways:
            layers, program = largest(chip, way, devices)
            dense = dense or (program.weights if way.layout is None else 0)
            row = [
                chip.title,
                way.title,
                f"{layers} x {chip.width}",
                f"{program.weights / 1e9:.2f}",
                f"{program.weights / dense:.1f}" if dense else "",
                f"{program.bytes / 2**30:.2f}",
            ]
            rows.append(row)
            print(" | ".join(row), flush=True)
    header = [
        "chips",
        "way",
        "layers x width",
        "10^9 weights, dense",
        "/ dense",
        "GiB a chip",
    ]
    return timing.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu")
    parser.add_argument("--chips", default="", help="rows with this in their name")
    parser.add_argument("--ways", default="", help="columns with this in their name")
    parser.add_argument("--quick", action="store_true", help="one small program each")
    args = parser.parse_args(argv)
    chips = [chip for chip in CHIPS if args.chips in chip.title]
    ways = [way for way in WAYS if args.ways in way.title]
    if not chips or not ways:
        parser.error("--chips or --ways is in the name of none")
    if args.quick:
        for way in ways:
            chip = chips[0]._replace(width=512)
            program = compile_step(chip, way, 2, aot.devices(chip.topology))
            print(f"{way.title}: {program.bytes / 2**20:.1f} MiB a chip")
        return
    print(f"\n{report(chips, ways)}\n")


if __name__ == "__main__":
    main()
