"""Packed parameters over a mesh: the same training, and fewer bytes moved."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from setting import HIDDEN, IN, OUT, ROWS, draw, jit, report, same_bits, strays, wait

import topkast_jax as tk

STEPS, EVERY, GROUPS = 6, 2, 8
BATCH = ("data", "fsdp")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
CALL = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
SPECS: dict[str, Any] = {
    "data": ((8, 1, 1), P()),
    "fsdp": ((2, 4, 1), P(None, "fsdp")),
    "tensor": ((2, 1, 4), P(None, "tensor")),
}


def moved_bytes(text: str) -> int:
    """Bytes of the outputs of all collectives of a compiled program."""
    total = 0
    for outputs, _ in CALL.findall(text):
        for kind, dims in ARRAY.findall(outputs):
            count = np.prod([int(d) for d in dims.split(",") if d], dtype=int)
            total += int(count) * BYTES[kind]
    return total


def parameters() -> Any:
    return {
        "one": {"kernel": draw(0, IN, HIDDEN) / 8, "bias": draw(1, HIDDEN) / 8},
        "two": {"kernel": draw(3, HIDDEN, OUT) / 16},
    }


def product(x: jax.Array, kernel: Any) -> jax.Array:
    if isinstance(kernel, tk.BlockMatrix):
        name = "blocks" if kernel.index.here.entries > 1 else None
        return tk.ops.sparse_matmul(x, kernel, name)
    return x @ kernel


def objective(alpha: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    z = jax.nn.relu(product(x, alpha["one"]["kernel"]) + alpha["one"]["bias"])
    return jnp.mean((product(z, alpha["two"]["kernel"]) - y) ** 2)


def batch(t: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(10 + t, ROWS, IN), draw(50 + t, ROWS, OUT)


def transformation(layout: Any, method: str, forward: float, backward: float) -> Any:
    inner = tk.blocks(4, 4) if layout == "block" else tk.unstructured
    options: Any = dict(
        refresh=tk.every(EVERY), structure=tk.groups_of(GROUPS, inner), penalty=0.0
    )
    if method == "top_kast":
        made = tk.top_kast(forward, backward, **options)
    else:
        del options["penalty"]
        made = tk.set_(forward, **options)
    return tk.sparse(optax.adam(0.01), made, layout=layout, seed=3)


def gradient(theta: Any, opt_state: Any, x: Any, y: Any) -> Any:
    """On one device, or wherever XLA puts it."""

    def loss(theta: Any) -> jax.Array:
        return objective(tk.sparsify(theta, tk.masks(opt_state)), x, y)

    return jax.value_and_grad(loss)(theta)


def apart(mesh: Any, shardings: Any) -> Any:
    """`gradient` of packed parameters, each device with the rows that it holds."""

    def local(theta: Any, masks: Any, x: Any, y: Any) -> Any:
        def loss(theta: Any) -> jax.Array:
            whole, all_masks = tk.gather_groups(theta, masks, shardings, BATCH)
            share = objective(tk.sparsify(whole, all_masks), x, y)
            return share / (mesh.shape["data"] * mesh.shape["fsdp"])

        value, gradients = jax.value_and_grad(loss)(theta)
        gradients = tk.reduce_gradients(gradients, shardings, BATCH)
        return jax.lax.psum(value, BATCH), gradients

    def over_devices(theta: Any, opt_state: Any, x: Any, y: Any) -> Any:
        masks = tk.masks(opt_state)
        of_theta = tk.sharding_specs(shardings, BATCH)
        of_masks = tk.state_shardings(opt_state, theta, shardings, None)
        of_masks = tk.sharding_specs(tk.masks(of_masks), BATCH)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(of_theta, of_masks, P(BATCH), P(BATCH)),
            out_specs=(P(), of_theta),
            axis_names=set(BATCH),
            check_vma=False,
        )(theta, masks, x, y)

    return over_devices


def step_with(tx: Any, of: Any) -> Any:
    def step(theta: Any, opt_state: Any, x: Any, y: Any) -> Any:
        value, gradients = of(theta, opt_state, x, y)
        updates, opt_state = tx.update(gradients, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state, value

    return step


def placed(place: str) -> Any:
    sizes, kernel = SPECS[place]
    mesh = jax.make_mesh(sizes, (*BATCH, "tensor"), (AxisType.Auto,) * 3)
    dense = jax.tree.map(
        lambda x: NamedSharding(mesh, kernel if x.ndim > 1 else P()), parameters()
    )
    return mesh, dense


def train(tx: Any, place: str | None) -> Any:
    """Losses, A after every step, the compiled text, arrays that strayed."""
    theta, opt_state, store = tk.start(tx, parameters())
    of, rows, shardings = gradient, None, None
    if place is not None:
        mesh, dense = placed(place)
        of_theta = tk.packed_shardings(tk.masks(opt_state), dense)
        everywhere = NamedSharding(mesh, P())
        of_state = tk.state_shardings(opt_state, theta, of_theta, everywhere)
        shardings = (of_theta, of_state)
        theta, opt_state = jax.device_put((theta, opt_state), shardings)
        rows = NamedSharding(mesh, P(BATCH))
        of = apart(mesh, of_theta)
    out = None if shardings is None else (*shardings, NamedSharding(mesh, P()))
    step = jit(step_with(tx, of), out_shardings=out)
    losses, seen, text, lost = [], [], "", []
    for t in range(STEPS):
        x, y = batch(t) if rows is None else jax.device_put(batch(t), rows)
        text = text or step.lower(theta, opt_state, x, y).compile().as_text()
        theta, opt_state, value = wait(step(theta, opt_state, x, y))
        losses.append(float(value))
        if tk.due(tx, t + 1):
            theta, opt_state, store = tk.refresh(tx, theta, opt_state, store)
        if shardings is not None:
            lost += strays((theta, opt_state), shardings)
        seen.append(jax.tree.map(np.asarray, tk.dense_masks(opt_state).forward))
    return losses, seen, text, lost


def dense_bytes(place: str) -> int:
    """What a step of the dense network moves."""
    mesh, dense = placed(place)
    tx = optax.adam(0.01)

    def step(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
        value, gradients = jax.value_and_grad(objective)(params, x, y)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.device_put(parameters(), dense)
    opt_state = tx.init(params)
    everywhere = NamedSharding(mesh, P())
    of_state = tk.state_shardings(opt_state, params, dense, everywhere)
    x, y = jax.device_put(batch(0), NamedSharding(mesh, P(BATCH)))
    step = jit(step, out_shardings=(dense, of_state, everywhere))
    return moved_bytes(step.lower(params, opt_state, x, y).compile().as_text())


def masked_update(kind: AxisType) -> int:
    """Bytes that the update of the masked layout moves, groups cut by the mesh."""
    mesh = jax.make_mesh((8,), ("fsdp",), (kind,))
    spread = jax.tree.map(
        lambda x: NamedSharding(mesh, P(None, "fsdp") if x.ndim > 1 else P()),
        parameters(),
    )
    tx = transformation("masked", "top_kast", 0.875, 0.75)
    state = jax.eval_shape(tx.init, parameters())
    of_state = tk.state_shardings(state, parameters(), spread, NamedSharding(mesh, P()))

    def abstract(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    theta = abstract(parameters(), spread)
    with jax.set_mesh(mesh):
        lowered = jit(tx.update).lower(theta, abstract(state, of_state), theta)
    return moved_bytes(lowered.compile().as_text())


def by_types(layout: str) -> dict[str, bool]:
    """Whether what dense arrays are made of is the same on a mesh of explicit axes."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    tx = transformation(layout, "top_kast", 0.875, 0.75)
    theta, state, _ = tk.start(tx, parameters())
    spread = jax.tree.map(
        lambda x: NamedSharding(mesh, P(None, "fsdp") if x.ndim > 1 else P()),
        parameters(),
    )
    placed = jax.tree.map(jax.device_put, parameters(), spread)
    there, of_there, _ = tk.start(tx, placed, shardings=spread)

    def alpha(theta: Any, state: Any) -> Any:
        return tk.sparsify(theta, tk.masks(state), expanded=True)

    def gradient(theta: Any, state: Any) -> Any:
        def total(theta: Any) -> Any:
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(alpha(theta, state)))

        return jax.grad(total)(theta)

    found = {}
    for name, make in {
        "masks": lambda theta, state: tk.dense_masks(state)[:2],
        "export": tk.export,
        "alpha": alpha,
        "gradient": gradient,
    }.items():
        wanted = jax.jit(make)(theta, state)
        with jax.set_mesh(mesh):
            got = wait(jit(make)(there, of_there))
        found[name] = all(
            np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
        )
    return found


def run(full: bool) -> None:
    """Some layouts and places, or all of them with two methods."""
    for layout in "packed", "block":
        report(f"explicit/{layout}", by_types(layout))
    for kind in AxisType.Auto, AxisType.Explicit:
        report(f"masked/{kind.name}", masked_update(kind))
    cells = [
        ("packed", "fsdp"),
        ("block", "fsdp"),
        ("block", "tensor"),
    ]
    if full:
        cells = [(layout, place) for layout in ("packed", "block") for place in SPECS]
    for layout, place in cells:
        for method in ("top_kast", "set")[: 2 if full else 1]:
            tx = transformation(layout, method, 0.875, 0.75)
            losses, seen, *_ = train(tx, None)
            here, masks, text, lost = train(tx, place)
            report(
                f"{layout}/{place}/{method}",
                {
                    "losses": losses,
                    "here": here,
                    "masks": same_bits(seen[:EVERY], masks[:EVERY]),
                    "lost": lost,
                    "moved": moved_bytes(text),
                    "dense": dense_bytes(place),
                    "share": 0.125 if method == "set" else 0.25,
                },
            )
