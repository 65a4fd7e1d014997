"""The refresh of packed arrays: on the host, between two updates, or beside them."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from topkast_jax import _trees
from topkast_jax._types import LeafMasks, Mixture, PyTree, SparseState
from topkast_jax.layouts import host
from topkast_jax.layouts import share as shares
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.share import Share
from topkast_jax.layouts.store import Store
from topkast_jax.packed import (
    ends,
    host_leaf,
    indexed,
    recipe_for,
    state_of,
    taken,
    wide,
)
from topkast_jax.plan import Site
from topkast_jax.transformation import Recipe

P: Any = PartitionSpec


class Choice(NamedTuple):
    """What a selection found for one parameter.

    Attributes:
      numbers: int32 [slices, n_B] of the new `Index`.
      masks: A and B as sets of the host.
      memory: of the method.
    """

    numbers: np.ndarray
    masks: LeafMasks
    memory: Any


class Chosen(NamedTuple):
    """Masks that a thread is choosing; from `choose`, for `refresh`.

    Attributes:
      choices: by the place of the parameter in the flattened tree.
      step: updates made when it began.
    """

    choices: "Future[dict[int, Choice]]"
    step: int


def choose(
    tx: optax.GradientTransformation,
    theta: PyTree,
    opt_state: optax.OptState,
    store: Store,
    found: PyTree = None,
) -> Chosen:
    """Begins to choose A and B in a thread, from the parameters as they are now.

    Training goes on meanwhile; `refresh(..., chosen=...)`, `refresh_delay` updates later,
    puts the masks in force. Only the copy of B to the host is waited for.

    Args:
      tx: `tk.sparse(..., layout="packed", refresh_delay=d)`.
      theta: the packed parameters.
      opt_state: the state that came with them.
      store: from `tk.start`; not to be touched until the refresh.
      found: what `tk.probe` returned, for methods that grow by gradient.
    Raises:
      ValueError: NaN or Inf in theta, named by path.
    Example:
      >>> import topkast_jax as tk
      >>> method = tk.top_kast(0.5, 0.25, refresh=tk.every(10))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="packed", refresh_delay=2)
      >>> theta, state, store = tk.start(tx, {"kernel": jnp.arange(4.0).reshape(2, 2)})
      >>> [step for step in range(30) if tk.due(tx, step)]
      [12, 22]
      >>> chosen = choose(tx, theta, state, store)  # before steps 10 and 20
      >>> theta, state, store = tk.refresh(tx, theta, state, store, chosen=chosen)
      >>> theta["kernel"].tolist()
      [2.0, 3.0, 1.0]
    """
    recipe = recipe_for(tx, "tk.choose")
    job = _Job(recipe, theta, opt_state, found)
    pool = ThreadPoolExecutor(1, thread_name_prefix="topkast-refresh")
    choices = pool.submit(job.select, recipe, store)
    pool.shutdown(wait=False)
    return Chosen(choices, job.step)


def refresh(
    tx: optax.GradientTransformation,
    theta: PyTree,
    opt_state: optax.OptState,
    store: Store,
    found: PyTree = None,
    chosen: Chosen | None = None,
) -> tuple[PyTree, optax.OptState, Store]:
    """Chooses A and B anew, and replaces the packed arrays.

    Writes B back to the reservoir, selects there, and ships the new B. Moments of
    entries that stay in B go with them; those of entries that enter are what
    `inner.init` gives them (`reset="keep"` has no meaning here: what is not in B has no
    moments). Arrays that lie on a mesh are put back where they were. Of several
    processes, all of them call it, and each does so for the slices that its devices hold.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      theta: the packed parameters, after an update.
      opt_state: the state that the update returned.
      store: from `tk.start`; written in place.
      found: what `tk.probe` returned, for methods that grow by gradient.
      chosen: what `choose` began, some updates ago; None chooses now.
    Returns:
      theta, opt_state and store, for the coming step.
    Raises:
      ValueError: NaN or Inf in theta, named by path; nothing has been changed then.
    """
    recipe = recipe_for(tx, "tk.refresh")
    job = _Job(recipe, theta, opt_state, found)
    if chosen is None:
        choices = job.select(recipe, store)
    else:
        choices = chosen.choices.result()
        job.write_back(store)  # the values of B as they are by now
    new_theta = [p.array for p in job.flat]
    memory, leaving = list(job.memory), {}
    indices = dict(job.indices)
    sources: dict[int, np.ndarray] = {}
    for i, choice in choices.items():
        site, new = job.sites[i], choice.numbers
        source = sources[i] = _source(job.numbers[i], new)
        if site.method.reservoir:
            new_theta[i] = taken(job.units(i, store), new, job.shares[i])
            leaving[site.path] = job.left(i, source)
        else:
            value = job.values[i]
            shipped = np.take_along_axis(value, wide(np.maximum(source, 0), value), 1)
            shipped[source < 0] = 0
            new_theta[i] = job.shares[i].place(shipped)
        indices[i] = indexed(new, choice.masks, job.shares[i], recipe)
        memory[i] = jax.tree.map(jnp.asarray, choice.memory)
    if leaving and store.journal is not None:
        store.journal.append(leaving)
    packed = job.treedef.unflatten(new_theta)
    state = job.state
    kept = dict(enumerate(memory))
    lies = None
    if any(map(_on_mesh, jax.tree.leaves(packed))):
        lies = jax.tree.map(
            lambda x: x.sharding if _on_mesh(x) else None, state.sparse_inner
        )
    fresh = state_of(
        recipe, state.sparse_seed, job.treedef, indices, kept, packed, lies
    )
    moves = {
        i: job.shares[i].place(source.astype(np.int32)) for i, source in sources.items()
    }
    moved = _moved(state.sparse_inner, fresh.sparse_inner, job.flat, moves)
    new_state = state._replace(
        sparse_masks=fresh.sparse_masks._replace(probe=state.sparse_masks.probe),
        sparse_memory=job.treedef.unflatten(memory),
        sparse_inner=moved,
    )
    after = (packed, _trees.replace_state(opt_state, new_state))
    return *_placed_like(after, (theta, opt_state)), store


class _Job:
    """The packed parameters of one moment, on the host.

    Attributes:
      state: of `tk.sparse`.
      flat, treedef: the parameters.
      memory: of the method, by parameter.
      seed: of the random draws.
      step: updates made.
      indices: by parameter, for those that are sparse: as they are.
      sites: likewise.
      shares: the slices that this process holds.
      numbers: [own, n_B] units of B.
      values: [own, n_B, *unit].
    """

    def __init__(
        self, recipe: Recipe, theta: PyTree, opt_state: PyTree, found: PyTree
    ) -> None:
        states = _trees.find_states(opt_state)
        if len(states) != 1:
            raise ValueError(
                f"{len(states)} states of tk.sparse in this optimizer state; a refresh "
                "serves the one that tk.start made"
            )
        self.state: SparseState = states[0]
        self.flat, self.treedef = _trees.parameters(theta)
        indices = self.treedef.flatten_up_to(self.state.sparse_masks.forward)
        # Copies: the next update may be given the arrays themselves.
        memory = jax.tree.map(np.array, self.state.sparse_memory)
        self.memory = self.treedef.flatten_up_to(memory)
        self.seed = np.array(self.state.sparse_seed)
        self.found = [None] * len(self.flat)
        if found is None and recipe.method.needs_gradient:
            raise ValueError(
                f"{recipe.method.name} chooses by the gradient of the entries in A: "
                "pass found=tk.probe(...), made in the step before the refresh"
            )
        if found is not None:
            self.found = self.treedef.flatten_up_to(found)
        self.step = int(self.state.sparse_step)
        self.indices = {i: x for i, x in enumerate(indices) if x is not None}
        self.sites: dict[int, Site] = {}
        self.shares: dict[int, Share] = {}
        self.numbers: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}
        for i, index in enumerate(indices):
            if index is None:
                continue
            path, array = self.flat[i].path, self.flat[i].array
            share = shares.of(index.grid, index.index.sharding)
            self.sites[i], self.shares[i] = _site(i, path, index, recipe), share
            self.numbers[i] = share.read(index.index)
            self.values[i] = share.read(array)
            if not _all_finite(array, self.values[i]):
                raise ValueError(
                    f"{path!r} holds NaN or Inf at step {self.step}; masks chosen from "
                    "it would mean nothing"
                )

    def units(self, i: int, store: Store) -> np.ndarray:
        """The reservoir of a parameter, [own, units, *unit]."""
        share, path = self.shares[i], self.sites[i].path
        shape = (len(share.own), share.grid.count, *share.grid.unit)
        return store.array(path, shape, share.of)

    def write_back(self, store: Store) -> None:
        """Brings the reservoir up to date."""
        for i, site in self.sites.items():
            if not site.method.reservoir:
                continue
            units = self.units(i, store)
            at = wide(self.numbers[i], units)
            np.put_along_axis(units, at, self.values[i], axis=1)

    def select(self, recipe: Recipe, store: Store) -> dict[int, Choice]:
        """Brings the reservoir up to date, and chooses."""
        self.write_back(store)
        choices = {}
        for i, site in self.sites.items():
            due = site.method.due
            if isinstance(recipe.method, Mixture) and not (due and due(self.step)):
                continue
            if site.method.reservoir:
                units = self.units(i, store)
                leaf = host_leaf(
                    site, self.seed, self.step, units, self.shares[i], units.dtype
                )
            else:
                leaf = self._listed(i)
            masks, memory = site.method.refresh(leaf, self.memory[i], self.step)
            numbers = host.numbered(site.grid, masks, len(self.numbers[i]))
            choices[i] = Choice(numbers, masks, memory)
        return choices

    def left(self, i: int, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Units that leave B: (own slice * units + number, values)."""
        stays = np.zeros(self.numbers[i].shape, bool)
        slices, _ = np.nonzero(source >= 0)
        stays[slices, source[source >= 0]] = True
        rows, at = np.nonzero(~stays)
        count = self.sites[i].grid.count
        places = rows * count + self.numbers[i][rows, at].astype(np.int64)
        return places, self.values[i][rows, at]

    def _listed(self, i: int) -> HostLeaf:
        """A leaf over the units of A alone."""
        site, value, found = self.sites[i], self.values[i], self.found[i]
        grid, share = site.grid, self.shares[i]
        places, order = host.selection_places(grid, self.numbers[i], share.own)
        flat = value.reshape(-1, *grid.unit)[order]
        grad, candidates, seen = np.zeros_like(flat), None, None
        if found is not None:
            grad = share.read(found.grad).reshape(-1, *grid.unit)[order]
        if found is not None and found.index is not None:
            numbers, others = (
                np.asarray(x)[share.own] for x in (found.index, found.candidates)
            )
            there, place = host.selection_places(grid, numbers, share.own)
            candidates = (there, others.reshape(-1, *grid.unit)[place])
            if found.seen is not None:
                real = np.asarray(found.seen)[share.own].reshape(-1)[place]
                rows = host.rows_of(grid, share.own)
                seen = np.sort((there + grid.size * rows[:, None])[real])
        marks = np.ones(flat.shape[:2], bool)
        return HostLeaf(
            grid=grid,
            counts=site.counts,
            path=site.path,
            key=_trees.leaf_key(self.seed, site.path, self.step),
            rows=host.rows_of(grid, share.own),
            places=places,
            value=flat,
            grad=grad,
            forward=marks,
            backward=marks,
            candidates=candidates,
            seen=seen,
        )


def _site(i: int, path: str, index: Index, recipe: Recipe) -> Site:
    counts = PackedLeaf(index.index, index.index, index, path, index.index).counts
    return Site(i, path, index.grid, counts, counts, recipe.method_of(path))


def _source(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where each unit of `new` stands in `old`, -1 where it does not; [slices, n]."""
    order = np.argsort(old, axis=1, kind="stable")
    found = np.full(new.shape, -1, np.int64)
    for s in range(len(old)):
        ranked = old[s][order[s]]
        at = np.minimum(np.searchsorted(ranked, new[s]), len(ranked) - 1)
        same = ranked[at] == new[s]
        found[s][same] = order[s][at[same]]
    return found


def _on_mesh(x: Any) -> bool:
    return isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1


def _all_finite(x: Any, own: np.ndarray) -> bool:
    """Whether an array is finite on every process, from what this one holds of it."""
    if getattr(x, "is_fully_addressable", True):
        return bool(np.isfinite(own.astype(np.float32, copy=False)).all())
    return bool(_finite(x))  # all of them must raise, or none


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _placed_like(new: PyTree, old: PyTree) -> PyTree:
    """Puts arrays where those that they replace were."""
    return jax.tree.map(
        lambda x, was: jax.device_put(x, was.sharding) if was.committed else x, new, old
    )


def _moved(
    state: PyTree,
    fresh: PyTree,
    params: list[_trees.Parameter],
    sources: dict[int, jax.Array],
) -> PyTree:
    """Slots of the inner optimizer: old values where a unit stays, else fresh ones.

    What belongs to a sparse parameter and is no slot (factored moments) begins anew: it
    sums over units that are not where they were.
    """
    leaves, treedef = _trees.parameters(state)
    news = treedef.flatten_up_to(fresh)
    owners = _trees.slots(state, params)
    out = []
    for leaf, new, owner in zip(leaves, news, owners, strict=True):
        old = leaf.array
        if owner is None or owner not in sources:
            sums = any(ends(leaf.path, params[i].path) for i in sources)
            out.append(new if owner is None and sums else old)
            continue
        apart = _on_mesh(old) and _on_mesh(sources[owner])
        follow = _follow_apart if apart else _follow
        out.append(follow(old, new, sources[owner]))
    return treedef.unflatten(out)


def _follow(old: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """[*stack, n, ...]: entry `source` of each slice of `old`; of `new` where it is -1."""
    at = source.reshape(*source.shape, *(1 for _ in old.shape[source.ndim :]))
    kept = jnp.take_along_axis(old, jnp.maximum(at, 0), axis=source.ndim - 1)
    return jnp.where(at >= 0, kept, new)


def _follow_apart(old: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """`_follow` on every device for the slices that it holds: nothing travels."""
    sharding: Any = old.sharding
    spec = P(*sharding.spec[: source.ndim - 1])
    return _over_devices(sharding.mesh, spec)(old, new, source)


@functools.cache
def _over_devices(mesh: Any, spec: Any) -> Callable[..., jax.Array]:
    specs = dict(in_specs=(spec, spec, spec), out_specs=spec)
    return jax.jit(jax.shard_map(_follow, mesh=mesh, **specs, check_vma=False))
