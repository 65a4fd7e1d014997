"""Where arrays live: the mesh, and which parameter is cut along which axis of it.

The mesh always has both axes, `data` and `fsdp`, of size 1 where the config does not
name them, so one list of rules serves every mesh. The batch is cut over both; `fsdp`
also cuts parameters, and the optimizer state follows its parameters.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.data.shard import WHOLE, Shard
from experiments.leaves import named
from experiments.tasks.shared import is_shared

AXES = ("data", "fsdp")
PyTree = Any
Rule = tuple[str, Any]


def parse(text: str) -> dict[str, int]:
    """`"data:4,fsdp:2"` as `{"data": 4, "fsdp": 2}`; axes left out have size 1.

    Raises:
      ValueError: an unknown axis, an axis named twice, or a size that is not a
        positive integer.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (part.strip() for part in item.partition(":"))
        if name not in AXES:
            raise ValueError(f"mesh={text!r}: axis {name!r} is none of {AXES}")
        if name in sizes:
            raise ValueError(f"mesh={text!r} names the axis {name!r} twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh={text!r}: the size of {name!r} must be a positive integer, as "
                "in data:4,fsdp:2"
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over the first devices; the axes are Auto, so XLA places the rest.

    Several processes use all of theirs: a process without devices could not take part.

    Args:
      text: see `parse`.
      devices: what to choose from; by default `jax.devices()`.
    Raises:
      ValueError: more devices asked for than there are, or fewer than several processes
        have, and what `parse` raises.
    """
    sizes = parse(text)
    together = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else devices
    asked = int(np.prod(list(sizes.values())))
    if asked > len(devices):
        raise ValueError(
            f"mesh={text!r} needs {asked} devices, but there are {len(devices)}"
            f" ({devices[0].platform}); choose sizes whose product is at most that"
        )
    if together and asked < len(devices):
        raise ValueError(
            f"mesh={text!r} takes {asked} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; it must take all of them"
        )
    grid = np.asarray(devices[:asked]).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
    """`"data:4,fsdp:2 on 8 of 8 cpu devices"`."""
    sizes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return f"{sizes} on {mesh.size} of {jax.device_count()} {kind} devices"


def require_rows(mesh: Mesh, training: int, held_out: int | None = None) -> None:
    """Finds batches that do not split over all devices before there is one.

    Args:
      mesh: from `make`.
      training: rows of a batch, `config.batch_size`.
      held_out: rows of a batch of an evaluation, `config.evaluation.rows`; None: as in
        training.
    Raises:
      ValueError: some do not; it says how many devices divide all of them.
    """
    rows = {"batch_size": training}
    if held_out is not None:
        rows["evaluation.rows"] = held_out
    uneven = [f"{key}={count}" for key, count in rows.items() if count % mesh.size]
    if not uneven:
        return
    common = math.gcd(*rows.values())
    most = max(n for n in range(1, mesh.size) if common % n == 0)
    sizes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
    raise ValueError(
        f"mesh={sizes!r} does not divide the batch: {' and '.join(uneven)} rows do not "
        f"split over {mesh.size} devices; of fewer devices {most} "
        f"{'does' if most == 1 else 'do'}, else change the rows"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process has whole, on the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])

    return jax.tree.map(one, tree, shardings)


def own_rows(mesh: Mesh) -> Shard:
    """Which rows of every batch the devices of this process hold.

    All of them (`WHOLE`) where they are no equal share of neighbours: each process then
    makes whole batches.
    """
    mine = [
        number
        for number, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]
    first, count = (mine[0], len(mine)) if mine else (0, mesh.size)
    neighbours = mine == list(range(first, first + count))
    if not neighbours or mesh.size % count or first % count:
        return WHOLE
    return Shard(first // count, mesh.size // count)


def place_batch(batch: PyTree, mesh: Mesh, shard: Shard) -> PyTree:
    """A batch of which every process made its own rows, on the devices of all.

    Args:
      batch: of NumPy arrays, the rows of `shard` alone.
      mesh: from `make`.
      shard: from `own_rows`.
    Raises:
      ValueError: rows that the mesh does not divide.
    """

    def whole(x: Any) -> jax.ShapeDtypeStruct:
        x = np.asarray(x)
        rows = (shard.count * x.shape[0], *x.shape[1:]) if x.ndim else ()
        return jax.ShapeDtypeStruct(rows, x.dtype)

    shapes = jax.tree.map(whole, batch)
    shardings = batch_shardings(mesh, shapes, "batch")
    if shard == WHOLE:
        return place(batch, shardings)
    return jax.tree.map(
        lambda x, s, shape: jax.make_array_from_process_local_data(
            s, np.asarray(x), shape.shape
        ),
        batch,
        shardings,
        shapes,
    )


def place_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A typed PRNG key on every device."""
    return jax.random.wrap_key_data(place(jax.random.key_data(key), replicated(mesh)))


def batch_shardings(mesh: Mesh, tree: PyTree, what: str) -> PyTree:
    """Shardings of a batch or a carry: axis 0, the global batch, over the whole mesh.

    Args:
      mesh: from `make`.
      tree: arrays or ShapeDtypeStructs; scalars are replicated, and what is `Shared`.
      what: how an error calls the tree.
    Raises:
      ValueError: a leaf whose axis 0 the mesh does not divide.
    """

    def one(path: Any, leaf: Any) -> Any:
        if is_shared(leaf):
            return jax.tree.map(lambda _: replicated(mesh), leaf)
        if not leaf.shape:
            return replicated(mesh)
        if leaf.shape[0] % mesh.size:
            sizes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
            raise ValueError(
                f"mesh={sizes!r} does not divide the batch: {what} "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')!r} has shape "
                f"{leaf.shape}, and {leaf.shape[0]} rows do not split over {mesh.size} "
                "devices; change the batch size or the mesh"
            )
        return NamedSharding(mesh, P(AXES))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_shared)


def parameter_shardings(
    mesh: Mesh,
    rules: Iterable[Rule],
    params: PyTree,
    preferred: Mapping[str, int] | None = None,
) -> PyTree:
    """Sharding of every parameter, by the first rule whose regex matches its path.

    A rule is `(regex, spec)`. The regex must match the whole path, such as
    `"block_0/mlp/kernel"`. The spec is one of
    * a tuple with an axis name, a tuple of names, or None per dimension: taken by the
      letter, and a dimension that does not divide is an error;
    * an axis name: the largest dimension that the axis divides is cut (the last of
      equals), and a parameter without one is replicated.

    Args:
      mesh: from `make`.
      rules: in order; they must cover every parameter.
      params: arrays or ShapeDtypeStructs.
      preferred: by path, the dimension that an axis name cuts instead of the largest.
    Raises:
      ValueError: a parameter no rule covers, a rule that covers nothing, or a spec that
        does not fit.
    """
    rules = [(str(regex), spec) for regex, spec in rules]
    paths = [path for path, _ in named(params)]
    for regex, _ in rules:
        if not any(re.fullmatch(regex, path) for path in paths):
            raise ValueError(
                f"sharding: the rule {regex!r} matches no parameter; there are "
                f"{', '.join(paths)}"
            )

    def one(path: str, leaf: Any) -> NamedSharding:
        for regex, spec in rules:
            if re.fullmatch(regex, path):
                if isinstance(spec, str) and preferred and path in preferred:
                    spec = (*(None,) * preferred[path], spec)
                return NamedSharding(mesh, _fit(mesh, path, leaf.shape, spec))
        raise ValueError(
            f"sharding: no rule covers {path!r}; add a rule, or end with ('.*', ())"
        )

    leaves = [one(path, leaf) for path, leaf in named(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _fit(mesh: Mesh, path: str, shape: tuple[int, ...], spec: Any) -> P:
    where = f"sharding of {path!r} with shape {shape}: {spec!r}"
    if isinstance(spec, str):
        size = _size(mesh, spec, where)
        fits = [(n, axis) for axis, n in enumerate(shape) if n and n % size == 0]
        if not fits:
            return P()
        return P(
            *(spec if axis == max(fits)[1] else None for axis in range(len(shape)))
        )
    entries = [tuple(e) if isinstance(e, list) else e for e in spec]
    if len(entries) > len(shape):
        raise ValueError(f"{where} names {len(entries)} dimensions")
    for axis, entry in enumerate(entries):
        size = _size(mesh, entry, where)
        if shape[axis] % size:
            raise ValueError(
                f"{where}: dimension {axis} of size {shape[axis]} does not split over "
                f"{entry!r} of size {size} in mesh {dict(mesh.shape)}; write the rule "
                f"as {entry!r} alone to cut the largest dimension that does"
            )
    return P(*entries)


def _size(mesh: Mesh, entry: Any, where: str) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"{where}: {name!r} is no axis of {dict(mesh.shape)}")
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))
