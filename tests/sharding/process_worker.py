"""Trains packed parameters on four devices, of one process or of several together.

    python process_worker.py FOLDER CELLS ADDRESS PROCESSES NUMBER

Not a test module: test_processes.py starts it and compares what it writes to
FOLDER/<processes>: arrays that are equal on any number of processes, and what each of
them alone holds.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import fast_compilation
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from topkast_jax.layouts import share

STEPS, EVERY, GROUPS, ROWS = 5, 2, 4, 8
AXES = ("data", "fsdp")
DUE = tk.every(EVERY)
SHAPES = {"one": (16, 24), "stack": (3, 8, 16)}
STRUCTURES = {
    "packed": tk.unstructured,
    "block": tk.blocks(4, 2),
    "columns": tk.fan_in(),
}


def parameters() -> Any:
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0)), strict=True))
    kernels = {
        name: {"kernel": jax.random.normal(keys[name], shape)}
        for name, shape in SHAPES.items()
    }
    return kernels | {"bias": jnp.zeros(24)}


def transformation(cell: str) -> tk.Sparse:
    name, layout = cell.split("/")
    options: Any = dict(refresh=DUE, structure=tk.groups_of(GROUPS, STRUCTURES[layout]))
    made = {
        "top_kast": lambda: tk.top_kast(0.75, 0.5, penalty=2.0**-10, **options),
        "random": lambda: tk.top_kast(0.75, 0.5, explore="random", **options),
        "set": lambda: tk.set_(0.75, **options),
        "rigl": lambda: tk.rigl(0.75, **options),
    }[name]()
    # Momentum, whose steps have no root or quotient that a compiler might round anew.
    return tk.sparse(
        optax.sgd(2.0**-5, momentum=0.5),
        made,
        layout="block" if layout == "block" else "packed",
        seed=5,
        axes=tk.axes({"stack/*": "s i o"}),
    )


def loss(theta: Any, opt_state: Any, x: Any, y: Any) -> jax.Array:
    """Sums of numbers with few bits: no order of additions changes a gradient."""
    alpha = tk.sparsify(theta, tk.masks(opt_state), expanded=True)
    total = jnp.sum((x @ alpha["one"]["kernel"] + alpha["bias"]) * y)
    return total + jnp.einsum("ri,sio->", x[:, :8], alpha["stack"]["kernel"])


def batch(t: int) -> Any:
    draws = np.random.default_rng(t)
    return tuple(
        draws.integers(-8, 9, (ROWS, n)).astype(np.float32) / 8 for n in (16, 24)
    )


def everywhere(tree: Any) -> list[np.ndarray]:
    """Arrays of all processes together; positions among them."""
    return [
        np.asarray(multihost_utils.process_allgather(x, tiled=True))
        if not x.is_fully_addressable
        else np.asarray(x)
        for x in jax.tree.leaves(tree)
    ]


def train(cell: str, mesh: Mesh, folder: Path) -> tuple[dict[str, Any], Any]:
    tx = transformation(cell)
    kernel = {2: P(None, "fsdp"), 3: P(None, None, "fsdp"), 1: P()}
    abstract = jax.eval_shape(parameters)
    dense = jax.tree.map(lambda x: NamedSharding(mesh, kernel[x.ndim]), abstract)
    read, pieces = share._pieces, []

    def spy(x: Any, sharding: Any) -> Any:
        for index, piece in read(x, sharding):
            pieces.append(piece.nbytes)
            yield index, piece

    share._pieces = spy
    theta, opt_state, store = tk.start(tx, parameters, shardings=dense)
    share._pieces = read
    out: dict[str, Any] = {"read": sum(pieces), "nbytes": store.nbytes}
    whole = tk.start(tx, parameters(), shardings=dense)[:2]
    for a, b in zip(
        jax.tree.leaves((theta, opt_state)), jax.tree.leaves(whole), strict=True
    ):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    start = everywhere((theta, opt_state))
    for a, b in zip(start, everywhere(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    if store.theta:
        journal = tk.Journal(folder / cell)
        journal.begin(store)
        store = tk.Store(store.theta, journal=journal, own=store.own)
    else:  # nothing as large as the parameters need exist
        only_shapes = abstract | {"bias": np.zeros(24, np.float32)}
        start += everywhere(tk.start(tx, only_shapes, shardings=dense)[0])
    lies = jax.tree.map(lambda x: x.sharding, (theta, opt_state))

    def step(theta: Any, opt_state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(loss)(theta, opt_state, x, y)
        updates, opt_state = tx.update(grads, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state

    compiled = jax.jit(step, out_shardings=lies, compiler_options=fast_compilation())
    rows = NamedSharding(mesh, P(AXES))
    history, begun = [start], opt_state
    for t in range(STEPS):
        x, y = (share.put(part, rows) for part in batch(t))
        found = None
        if "rigl" in cell and tk.due(tx, t + 1):
            found = tk.probe(loss, theta, opt_state, x, y)
        theta, opt_state = jax.block_until_ready(compiled(theta, opt_state, x, y))
        if tk.due(tx, t + 1):
            theta, opt_state, store = tk.refresh(tx, theta, opt_state, store, found)
            history.append(everywhere((theta, opt_state)))
        for new, old in zip(
            jax.tree.leaves((theta, opt_state)), jax.tree.leaves(lies), strict=True
        ):
            assert new.sharding.is_equivalent_to(old, new.ndim)
    first, last = (everywhere(tk.masks(tree).forward) for tree in (begun, opt_state))
    out["moved"] = any((a != b).any() for a, b in zip(first, last, strict=True))
    out["history"] = [x for arrays in history for x in arrays]
    own = tk.own_slices(tk.masks(opt_state))
    assert {k: v[0].tolist() for k, v in own.items()} == {
        k: v[0].tolist() for k, v in store.own.items()
    } or not store.theta
    out["theta"] = store.theta
    out["own"] = {path: store.slices(path)[0] for path in store.theta}
    return out, (tx, theta, opt_state, store)


def others(own: Any) -> Any:
    """The slices that this process does not have."""
    return {
        path: (np.setdiff1d(np.arange(count), here), count)
        for path, (here, count) in own.items()
    }


def spoil(x: jax.Array) -> jax.Array:
    return x.at[(-1,) * x.ndim].set(jnp.nan)


def run(folder: Path, cells: list[str], mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cell in cells:
        here = folder / str(jax.process_count())
        out, (tx, theta, opt_state, store) = train(cell, mesh, here)
        if store.journal is not None:
            own, records = store.own, store.journal.records
            again = tk.Journal(here / cell).load(records, own=own)
            assert again.journal is not None
            out["again"] = again.theta
            if jax.process_count() > 1:
                out["swapped"] = (
                    tk.Journal(here / cell).load(records, own=others(own)).theta
                )
                alone = tk.Journal(folder / "1" / cell)
                out["of_one"] = alone.load(records, folder / "mapped", own=own).theta
                with np.testing.assert_raises_regex(
                    ValueError, "written on another mesh"
                ):
                    tk.refresh(
                        tx, theta, opt_state, tk.Store(out["swapped"], own=others(own))
                    )
        # NaN on the last device alone is seen by every process, and changes nothing.
        kernel = theta["one"]["kernel"]
        theta["one"]["kernel"] = jax.jit(spoil)(kernel)
        with np.testing.assert_raises_regex(ValueError, "'one/kernel' holds NaN"):
            tk.refresh(tx, theta, opt_state, store)
        found[cell] = out
    return found


if __name__ == "__main__":
    folder, cells, address, processes, number = sys.argv[1:]
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(number))
    assert jax.device_count() == 4
    # "fsdp" goes over the processes, so that each holds half of every kernel.
    grid = np.array(jax.devices()).reshape(2, 2).T
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)
    found = run(Path(folder), cells.split(","), mesh)
    target = Path(folder) / f"{processes}-{number}.npy"
    np.save(target, np.array(found, dtype=object), allow_pickle=True)
