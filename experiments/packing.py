"""The packed layouts in the training loop: their start, their bytes, their reservoir.

In the masked layout masks change inside the update, and none of this is used.
"""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import topkast_jax as tk
from experiments import budget, distributed
from experiments import mesh as meshes
from experiments import state as states
from experiments.leaves import named
from experiments.state import State
from experiments.tasks import Task

PyTree = Any
RESERVOIR, THETA = (
    "reservoir",
    "theta",
)  # folders of a workdir: the journal, mapped files
ONE_BY_ONE = 2**30
"""Bytes of dense parameters from which they are made leaf by leaf: that compiles more."""


def abstract(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> State:
    """ShapeDtypeStructs of the state: of step 0, or of `sizes`, see `tk.shapes`."""
    params, carry = jax.eval_shape(task.init, key)
    theta, opt_state = tk.shapes(tx, params, sizes)
    return State(theta, opt_state, carry)


def begin(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    shardings: State,
    rules: Iterable[meshes.Rule],
    folder: pathlib.Path | None = None,
    given: PyTree = None,
) -> tuple[State, tk.Store]:
    """The state of step 0, and the reservoir.

    Args:
      task: makes parameters and carry.
      tx: the transformation.
      key: of the parameters.
      shardings: of the state.
      rules: of dense parameters; several processes make each parameter in its shards.
      folder: of files in which the reservoir lives; None: in memory.
      given: parameters in place of random ones.
    """

    def params() -> PyTree:
        return task.init(key)[0]

    size = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(params))
    )
    alone = jax.process_count() == 1
    made = jax.jit(params)() if alone and size <= ONE_BY_ONE else params
    made = made if given is None else given
    dense = None
    if not alone:
        abstract_state = abstract(task, tx, key)
        mesh = jax.tree.leaves(shardings)[0].mesh
        dense = states.dense_shardings(mesh, rules, abstract_state)
    theta, opt_state, store = tk.start(tx, made, reservoir=folder, shardings=dense)
    carry = jax.jit(lambda: task.init(key)[1], out_shardings=shardings.carry)()
    return jax.device_put(State(theta, opt_state, carry), shardings), store


def keep(store: tk.Store, workdir: pathlib.Path) -> tk.Store:
    """A store whose refreshes are written down in a workdir; an empty one as it is."""
    if not store.theta:
        return store
    parent = workdir / RESERVOIR
    taken = [int(f.name) for f in parent.glob("*") if f.name.isdecimal()]
    # A folder of its own: checkpoints of another layout still need theirs.
    number = distributed.of_first(max(taken, default=0) + 1)
    journal = tk.Journal(parent / f"{number:04}")
    journal.begin(store)
    return dataclasses.replace(store, journal=journal)


def noted(store: tk.Store) -> dict[str, Any] | None:
    """JSON data from which `recall` finds the reservoir again; None without one."""
    if store.journal is None:
        return None
    return {"folder": store.journal.folder.name, "records": store.journal.records}


def recall(
    workdir: pathlib.Path, in_files: bool, noted: Mapping[str, Any] | None, state: State
) -> tk.Store:
    """The reservoir of a checkpoint; what was written down after it is forgotten.

    Where other processes go on than wrote it, they put together what each of them needs,
    and begin to write anew.

    Args:
      workdir: of the run.
      in_files: whether theta is to live in files.
      noted: what the checkpoint knows; None: the method keeps no reservoir.
      state: of the checkpoint, where it goes on.
    Raises:
      ValueError: files that are missing or damaged, by name.
    """
    if noted is None:
        return tk.Store()
    journal, records = (
        tk.Journal(workdir / RESERVOIR / noted["folder"]),
        noted["records"],
    )
    own = tk.own_slices(tk.masks(state.opt_state))
    store = journal.load(records, workdir / THETA if in_files else None, own)
    if store.journal is None:
        return keep(store, workdir)
    journal.rewind(records)
    return store


def tidy(store: tk.Store, kept: Sequence[Mapping[str, Any] | None] | None) -> None:
    """Compacts a reservoir's journal, and drops what no checkpoint needs.

    Args:
      store: of the run.
      kept: what the checkpoints have noted; None where one of them cannot be read, and
        then nothing is dropped.
    """
    journal = store.journal
    if journal is None:
        return
    names = {noted["folder"] for noted in kept or () if noted}
    own = [n["records"] for n in kept or () if n and n["folder"] == journal.folder.name]
    journal.tidy(oldest=min(own, default=0))
    if not distributed.is_first():
        return
    for other in journal.folder.parent.iterdir() if own else ():
        if other != journal.folder and other.name not in names:
            shutil.rmtree(other)


def needs(state: State, reservoir: bool) -> budget.Budget:
    """What a run takes on each device, and of this process and its disk.

    Args:
      state: ShapeDtypeStructs with shardings.
      reservoir: whether the method keeps one.
    """
    own = tk.own_slices(tk.masks(state.opt_state))
    indices = _indices(state.opt_state)

    def here(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    def dense(keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path not in indices:
            return leaf
        grid = indices[path].grid
        count = grid.whole[0]
        slices = len(own[path][0]) if path in own else count
        size = math.prod(grid.shape) // count * slices
        return jax.ShapeDtypeStruct((size,), leaf.dtype)

    whole = jax.tree_util.tree_map_with_path(dense, state.params)
    params, opt_state, carry = jax.tree.map(here, tuple(state[:3]))
    found = budget.budget(whole, params, opt_state, 0, reservoir)
    refresh = found.refresh + budget.size_of(carry)
    return found._replace(refresh=refresh, disk=2 * found.theta)


def described(opt_state: PyTree) -> dict[str, Any]:
    """JSON data from which `undescribed` makes the `tk.Index` of every parameter."""
    return {
        path: {
            "units": [index.k_forward, index.index.shape[-1]],
            "shape": index.grid.shape,
            "axes": index.grid.axes,
            "structure": index.grid.structure,
        }
        for path, index in _indices(opt_state).items()
    }


def sizes(description: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """`{path: (n_A, n_B)}` of what `described` gave, for `abstract`."""
    return {path: tuple(said["units"]) for path, said in description.items()}


def undescribed(description: Mapping[str, Any]) -> dict[str, tk.Index]:
    """`{path: tk.Index}` with a ShapeDtypeStruct for the positions."""
    struct: Any = jax.ShapeDtypeStruct
    found = {}
    for path, said in description.items():
        axes = tk.Axes(*(tuple(group) for group in said["axes"]))
        name, block, *rest = said["structure"]
        structure = tk.Structure(name, tuple(block), *rest)
        grid = tk.Grid(tuple(said["shape"]), axes, structure)
        first, units = said["units"]
        found[path] = tk.Index(struct((*grid.stack, units), np.int32), grid, first)
    return found


def _indices(opt_state: PyTree) -> dict[str, tk.Index]:
    forward = tk.masks(opt_state).forward
    found = named(forward, is_leaf=lambda x: isinstance(x, tk.Index))
    return {path: leaf for path, leaf in found if isinstance(leaf, tk.Index)}
