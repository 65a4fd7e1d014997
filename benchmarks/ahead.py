"""Whole train steps of the decoder, compiled ahead of time for chips that are not there."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from benchmarks import decoder

PyTree = Any
Devices = Sequence[Any]
SEGMENT, AXIS = 1024, "fsdp"
COLLECTIVES = ("all_gather", "reduce_scatter", "psum")
SIZE = re.compile(r"([\d.]+)([MGT])")


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


def shapes(layers: int, width: int) -> PyTree:
    """Parameters of the dense network."""
    stack = decoder.layer_shapes(width, layers)
    return {"layers": stack, "embedding": decoder.embedding_shape(width)}


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


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      bytes: of one device.
      weights: of the dense network.
    """

    bytes: int
    weights: int


def trace_step(chip: Chip, way: Way, layers: int, devices: Devices) -> Any:
    """Traces a train step; `.lower().compile()` compiles it."""
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
            stacked = masks and tk.Masks(*(m and m["layers"] for m in masks))

            @jax.checkpoint
            def body(x: jax.Array, operands: Any) -> tuple[jax.Array, None]:
                own, marks = operands
                none = jax.tree.map(lambda _: None, own)
                given = marks if masks else tk.Masks(none, none, none)
                whole, everything = tk.gather_groups(own, given, of_layer, (AXIS,))
                if masks:
                    whole, everything = tk.merge_groups(whole, everything)
                    expanded = way.layout == "packed"
                    whole = tk.sparsify(whole, everything, expanded=expanded)
                # "blocks": what is chosen by default is for the devices that are here.
                return decoder.layer(whole, x, "blocks"), None

            def through(x: jax.Array) -> jax.Array:
                return jax.lax.scan(body, x, (theta["layers"], stacked))[0]

            return decoder.loss(theta["embedding"], text, through) / chip.devices

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
    return jitted.trace(placed(theta, of_theta), placed(opt_state, of_state), text)


def compile_step(chip: Chip, way: Way, layers: int, devices: Devices) -> Program:
    """Compiles a train step.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit.
    """
    program = trace_step(chip, way, layers, devices).lower().compile()
    found: Any = program.memory_analysis()
    used = (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    dense = jax.tree.leaves(shapes(layers, chip.width))
    return Program(used, sum(math.prod(x.shape) for x in dense))


def moved(jaxpr: Any) -> int:
    """Bytes that the collectives of a step give out on a device.

    From the traced program, where each of them is explicit, and loops tell their turns.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in COLLECTIVES:
            total += sum(x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
        inner = sum(map(moved, jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1)
    return total


class Refused(NamedTuple):
    """What the compiler says of a program that does not fit, in bytes of a device."""

    needed: float
    room: float


def refusal(chip: Chip, way: Way, layers: int, devices: Devices) -> Any:
    """A program, or the compiler's refusal of it."""
    try:
        return compile_step(chip, way, layers, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return said(str(error))


def said(message: str) -> Refused:
    """Reads a refusal: the largest size that it names, and the one before "available".

    Raises:
      ValueError: it names fewer than two.
    """
    scale = {"M": 2**20, "G": 2**30, "T": 2**40}
    line = message.replace("\n", " ")
    sizes = [float(number) * scale[unit] for number, unit in SIZE.findall(line)]
    if len(sizes) < 2:
        raise ValueError(f"a refusal without sizes: {line[:300]}")
    needed = max(sizes)
    return Refused(needed, next(size for size in sizes if size < needed))
