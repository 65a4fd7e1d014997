"""Checkpoints: saved whole, sealed with checksums, restored in parts.

One folder a step, one Orbax item a part: `params`, `masks`, `opt_state`, `carry`, `ema`,
and as JSON `data` (the position in the data) and `meta` (config, versions, and whatever
the loop wants back). Evaluation reads `params`, `masks`, `ema`, and `shared`, which is
the part of `carry` that belongs to no row.

Orbax writes to a temporary folder and renames it, so a save that was killed leaves no
checkpoint. It does not notice bytes that changed on disk in a finished one, hence the
seal: the checksum of every file, written once the save is complete.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

import topkast_jax as tk
from experiments import distributed, packing, paths, seal
from experiments.leaves import named
from experiments.state import State, is_sparse
from experiments.tasks.shared import shared

PyTree = Any
T = TypeVar("T")


class Restored(NamedTuple):
    """What a run goes on from: its state, data iterator state, `meta`, and in the
    packed layouts the reservoir.
    """

    state: State
    data: Any
    meta: dict[str, Any]
    store: tk.Store | None = None


class Weights(NamedTuple):
    """What evaluation needs.

    Attributes:
      params: theta.
      masks: A, also in the place of B; None where a parameter is dense.
      meta: of the checkpoint.
      shared: what the carry shares, see `experiments.tasks.shared`.
      ema: moving average of alpha; None where the run has none.
    """

    params: PyTree
    masks: tk.Masks
    meta: dict[str, Any]
    shared: list[Any]
    ema: PyTree = None

    @property
    def alpha(self) -> PyTree:
        """The weights to evaluate with: those of the network, or their average."""
        if self.ema is not None:
            return self.ema
        if not jax.tree.leaves(self.masks.forward):
            return self.params
        return tk.sparsify(self.params, self.masks, expanded=True)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: they lie in `workdir/checkpoints`, damaged ones in `workdir/damaged`.
      keep: how many to keep; at least 2, so that there is one to fall back to.
      warn: told, in one line, of every checkpoint that cannot be read.
    Raises:
      ValueError: `keep` is too small.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 2,
        warn: Callable[[str], None] = print,
    ) -> None:
        if keep < 2:
            raise ValueError(
                f"keep={keep}: keep at least 2 checkpoints, one to fall to"
            )
        self.folder = paths.whole(paths.folder(workdir)) / "checkpoints"
        self._keep, self._warn = keep, warn
        self._manager: ocp.CheckpointManager | None = None
        self._unsealed: epath.Path | None = None
        self._reservoirs: dict[int, Any] = {}  # what was noted, by step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, damaged or not."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> dict[str, Any] | None:
        """`meta` of the newest checkpoint; None where there is none.

        Arrays are neither read nor verified.

        Raises:
          ValueError: it cannot be read, or is not as it was when it was sealed.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.folder / str(steps[-1])
        try:
            return _meta(path, "meta")
        except Exception as error:  # whatever a broken folder makes of Orbax
            raise ValueError(
                f"checkpoint {path} cannot be read: {_line(error)}"
            ) from error

    def save(
        self,
        step: int,
        state: State,
        data: Any,
        meta: Mapping[str, Any],
        store: tk.Store | None = None,
    ) -> None:
        """Copies the state off the devices, then writes it in the background.

        A step that is there already is left as it is: it holds the same, if perhaps in
        another layout.

        Args:
          step: number of updates done.
          state: may be donated as soon as this returns.
          data: JSON data, the state of the data iterator.
          meta: JSON data; `step` and the kinds of all arrays are added.
          store: the reservoir of a packed layout, of which only the place in its
            journal is saved.
        """
        self.wait()
        if store is not None:
            packing.tidy(store, self._noted())
        if step in self.steps():
            return
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        if store is not None:
            meta = {**meta, "packed": packing.described(state.opt_state)}
            meta["reservoir"] = packing.noted(store)
        masks = _named_masks(state.opt_state)
        trees = {**state._asdict(), "masks": masks, "shared": shared(state.carry)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                # In a list, since Orbax refuses a tree that is empty.
                **{name: ocp.args.StandardSave([tree]) for name, tree in trees.items()},
                data=ocp.args.JsonSave({"iterator": data}),
                meta=ocp.args.JsonSave(
                    {
                        **meta,
                        "step": step,
                        "arrays": {name: _kinds(tree) for name, tree in trees.items()},
                    }
                ),
            ),
            force=True,
        )
        self._unsealed = self.folder / str(step)

    def wait(self) -> None:
        """Returns when the last save is complete on disk, and sealed."""
        if self._manager is not None and self._unsealed is not None:
            self._manager.wait_until_finished()
            if distributed.is_first():
                seal.close(self._unsealed)
            distributed.wait("sealed")
            self._unsealed = None

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(
        self,
        prepare: Callable[[dict[str, Any]], State],
        reservoir: Callable[[Any, State], tk.Store] | None = None,
    ) -> Restored | None:
        """The newest checkpoint that can be read; None where there is none at all.

        Newer ones that cannot be read are moved to `workdir/damaged`, loudly.

        Args:
          prepare: `meta -> ShapeDtypeStructs` with the shardings to restore to; it may
            raise where the checkpoint is not wanted.
          reservoir: what the checkpoint has noted of it, and its state -> the store of a
            packed layout.
        Raises:
          ValueError: there are checkpoints, but none can be read, or the newest intact
            one holds other arrays than those asked for.
        """

        def targets(meta: dict[str, Any]) -> dict[str, PyTree]:
            return prepare(meta)._asdict()

        def read(path: epath.Path, meta: dict[str, Any], arrays: Any) -> Restored:
            found = _read(path, **arrays, data=ocp.args.JsonRestore())
            # What a checkpoint of an older version lacks has no arrays.
            state = State(**{name: found[name][0] for name in arrays})
            store = None
            if "packed" in meta and reservoir is not None:
                store = reservoir(meta["reservoir"], state)
            return Restored(state, found["data"]["iterator"], meta, store)

        self.wait()
        return self._newest(targets, read, set_aside=True)

    def weights(
        self, prepare: Callable[[dict[str, Any]], tuple[PyTree, list[Any]]]
    ) -> Weights | None:
        """What evaluation needs of the newest checkpoint that can be read, no more.

        Nothing on disk changes, so a run may go on writing meanwhile.

        Args:
          prepare: `meta -> ShapeDtypeStructs` of the parameters, and of what the carry
            shares, with shardings.
        Raises:
          ValueError: as in `restore`.
        """

        def targets(meta: dict[str, Any]) -> dict[str, PyTree]:
            params, common = prepare(meta)
            if "packed" in meta:
                return _packed_targets(params, meta["packed"]) | {"shared": common}
            ema = params if meta["arrays"].get("ema") else ()
            saved = meta["arrays"]["masks"]
            masks = {
                name: jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=x.sharding)
                for name, x in named(params)
                if f"forward/{name}" in saved
            }
            shrink = {
                name: _struct(saved[f"shrink/{name}"], _everywhere(x.sharding))
                for name, x in named(params)
                if f"shrink/{name}" in saved
            }
            trees = {"forward": masks, "backward": masks, "shrink": shrink}
            return {"params": params, "masks": trees, "shared": common, "ema": ema}

        def read(path: epath.Path, meta: dict[str, Any], arrays: Any) -> Weights:
            found = _read(path, **arrays)
            (params,), (masks,) = found["params"], found["masks"]
            (common,), (ema,) = found.get("shared", [[]]), found.get("ema", [()])
            if "packed" in meta:
                masks = {"forward": _indices(masks["forward"], meta["packed"])}

            def tree(found: Mapping[str, Any]) -> PyTree:
                leaves = [found.get(name) for name, _ in named(params)]
                return jax.tree.unflatten(jax.tree.structure(params), leaves)

            forward, nothing = tree(masks["forward"]), tree({})
            shrink = tree(masks.get("shrink", {}))
            of_all = tk.Masks(forward, forward, nothing, shrink)
            average = ema if jax.tree.leaves(ema) else None
            return Weights(params, of_all, meta, common, average)

        return self._newest(targets, read, set_aside=False)

    def _newest(
        self,
        targets: Callable[[dict[str, Any]], dict[str, PyTree]],
        read: Callable[[epath.Path, dict[str, Any], Any], T],
        *,
        set_aside: bool,
    ) -> T | None:
        unreadable: dict[int, str] = {}
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            try:
                meta = _meta(path)
            except Exception as error:  # whatever a broken folder makes of Orbax
                unreadable[step] = _line(error)
                continue
            wanted = targets(meta)
            _require_same_arrays(path, meta, wanted)
            restore = {
                name: ocp.args.StandardRestore([tree])
                for name, tree in wanted.items()
                if name in meta["arrays"]
            }
            try:
                found = read(path, meta, restore)
            except Exception as error:
                unreadable[step] = _line(error)
                continue
            for bad, why in unreadable.items():
                self._warn(f"warning: checkpoint {bad} cannot be read: {why}")
                self._warn(f"warning: falling back from checkpoint {bad} to {step}")
                if set_aside:
                    kept = self._set_aside(bad)
                    self._warn(f"warning: checkpoint {bad} is kept in {kept}")
            return found
        if unreadable:
            reasons = "; ".join(f"{step}: {why}" for step, why in unreadable.items())
            raise ValueError(
                f"no checkpoint in {self.folder} can be read ({reasons}); to start "
                "over, name another workdir, or move this folder away"
            )
        return None

    def _noted(self) -> list[Any] | None:
        """What each checkpoint knows of its reservoir; None where one cannot be read."""
        for step in self.steps():
            if step in self._reservoirs:
                continue
            try:
                meta = _meta(self.folder / str(step))
            except Exception:  # as in `_newest`, which will say so
                return None
            self._reservoirs[step] = meta.get("reservoir")
        return [self._reservoirs[step] for step in self.steps()]

    def _set_aside(self, step: int) -> epath.Path:
        folder = self.folder.parent / "damaged"
        folder.mkdir(exist_ok=True)
        taken = {path.name for path in folder.iterdir()}
        names = (str(step), *(f"{step}.{n}" for n in range(1, len(taken) + 1)))
        target = folder / next(name for name in names if name not in taken)
        distributed.wait("damaged")
        if distributed.is_first():
            (self.folder / str(step)).rename(target)
        distributed.wait("set aside")
        if self._manager is not None:
            self._manager.reload()
        return target


def _read(path: epath.Path, **parts: Any) -> Any:
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**parts))


def _meta(path: epath.Path, part: str = "") -> dict[str, Any]:
    """`meta` of a checkpoint that is as it was when it was sealed, or a part of it."""
    seal.verify(path, part)
    meta: dict[str, Any] = _read(path, meta=ocp.args.JsonRestore())["meta"]
    return meta


def _kinds(tree: PyTree) -> dict[str, str]:
    """`{path: "float32[8,6]"}` of arrays or ShapeDtypeStructs."""
    return {
        name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in named(tree)
    }


def _struct(kind: str, sharding: Any) -> Any:
    """Inverse of `_kinds`, for one array."""
    dtype, _, sizes = kind.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def _everywhere(sharding: Any) -> Any:
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _require_same_arrays(
    path: epath.Path, meta: Mapping[str, Any], wanted: Mapping[str, PyTree]
) -> None:
    """Raises ValueError naming an array that is not what the program asks for.

    Not damage: the checkpoint was written by a program with another model or optimizer.
    """
    for part, tree in wanted.items():
        saved, asked = meta["arrays"].get(part, {}), _kinds(tree)
        for name in sorted(saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise ValueError(
                    f"{path} does not hold what this program trains: {part} "
                    f"{name!r} is {saved.get(name, 'absent')} in the checkpoint, and "
                    f"{asked.get(name, 'absent')} in the program"
                )


def _named_masks(opt_state: PyTree) -> dict[str, dict[str, Any]]:
    """Masks by the path of their parameter: they load without knowing the optimizer."""
    if not is_sparse(opt_state):
        return {"forward": {}, "backward": {}, "shrink": {}}
    masks = tk.masks(opt_state)
    return {
        "forward": dict(named(masks.forward)),
        "backward": dict(named(masks.backward)),
        "shrink": dict(named(masks.shrink)),
    }


def _packed_targets(params: PyTree, description: Mapping[str, Any]) -> dict[str, Any]:
    """What to restore for evaluation: packed parameters, and the positions of B."""
    indices = packing.undescribed(description)
    # Shardings of the dense arrays do not fit: every device gets all of them.
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def packed(path: Any, leaf: Any) -> Any:
        index = indices.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        if index is None:
            return leaf
        return leaf.update(shape=index.stored, sharding=whole)

    forward = {
        f"{path}/index": index.index.update(sharding=whole)
        for path, index in indices.items()
    }
    params = jax.tree_util.tree_map_with_path(packed, params)
    trees = {"forward": forward, "backward": {}, "shrink": {}}
    return {"params": params, "masks": trees}


def _indices(arrays: Mapping[str, Any], description: Mapping[str, Any]) -> Any:
    return {
        path: dataclasses.replace(index, index=arrays[f"{path}/index"])
        for path, index in packing.undescribed(description).items()
    }


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
