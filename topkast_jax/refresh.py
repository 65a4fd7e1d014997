"""The refresh of packed arrays: on the host, between two updates, or beside them."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax import _trees
from topkast_jax._types import LeafMasks, PyTree, SparseState
from topkast_jax.layouts import host
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.store import Store
from topkast_jax.packed import (
    ends,
    host_leaf,
    indexed,
    recipe_for,
    state_of,
    stored,
    taken,
    wide,
)
from topkast_jax.plan import Site
from topkast_jax.transformation import Recipe


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
    moments). Arrays that lie on a mesh are put back where they were.

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
        job.write_back(recipe, store)  # the values of B as they are by now
    new_theta = [p.array for p in job.flat]
    memory, leaving = list(job.memory), {}
    indices: dict[int, Index] = {}
    sources: dict[int, np.ndarray] = {}
    for i, choice in choices.items():
        site, new = job.sites[i], choice.numbers
        source = sources[i] = _source(job.numbers[i], new)
        if recipe.method.reservoir:
            new_theta[i] = taken(job.units(site, store), new, site)
            leaving[site.path] = job.left(i, source)
        else:
            value = job.values[i]
            shipped = np.take_along_axis(value, wide(np.maximum(source, 0), value), 1)
            shipped[source < 0] = 0
            new_theta[i] = stored(shipped, site)
        indices[i] = indexed(new, choice.masks, site, recipe)
        memory[i] = jax.tree.map(jnp.asarray, choice.memory)
    if recipe.method.reservoir and store.journal is not None:
        store.journal.append(leaving)
    packed = job.treedef.unflatten(new_theta)
    state = job.state
    kept = dict(enumerate(memory))
    fresh = state_of(recipe, state.sparse_seed, job.treedef, indices, kept, packed)
    moved = _moved(state.sparse_inner, fresh.sparse_inner, job.flat, sources, indices)
    new_state = state._replace(
        sparse_masks=fresh.sparse_masks,
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
      sites: by parameter, for those that are sparse.
      numbers: [slices, n_B] units of B.
      values: [slices, n_B, *unit].
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
        self.sites: dict[int, Site] = {}
        self.numbers: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}
        for i, index in enumerate(indices):
            if index is None:
                continue
            path, grid = self.flat[i].path, index.grid
            slices = grid.whole[0]
            self.sites[i] = _site(i, path, index, recipe)
            self.numbers[i] = np.array(index.index).reshape(slices, -1)
            value = np.asarray(self.flat[i].array).reshape(slices, -1, *grid.unit)
            if not np.isfinite(value.astype(np.float32, copy=False)).all():
                raise ValueError(
                    f"{path!r} holds NaN or Inf at step {self.step}; masks chosen from "
                    "it would mean nothing"
                )
            self.values[i] = np.array(value)  # on CPU it may be the device's own

    def units(self, site: Site, store: Store) -> np.ndarray:
        """The reservoir of a parameter, [slices, units, *unit]."""
        grid = site.grid
        return store.array(site.path, (grid.whole[0], grid.count, *grid.unit))

    def write_back(self, recipe: Recipe, store: Store) -> None:
        """Brings the reservoir up to date."""
        if not recipe.method.reservoir:
            return
        for i, site in self.sites.items():
            units = self.units(site, store)
            at = wide(self.numbers[i], units)
            np.put_along_axis(units, at, self.values[i], axis=1)

    def select(self, recipe: Recipe, store: Store) -> dict[int, Choice]:
        """Brings the reservoir up to date, and chooses."""
        self.write_back(recipe, store)
        choices = {}
        for i, site in self.sites.items():
            if recipe.method.reservoir:
                units = self.units(site, store)
                leaf = host_leaf(site, self.seed, self.step, units, units.dtype)
            else:
                leaf = self._listed(i)
            masks, memory = recipe.method.refresh(leaf, self.memory[i], self.step)
            choices[i] = Choice(
                host.numbered(site.grid, masks.forward, masks.backward), masks, memory
            )
        return choices

    def left(self, i: int, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Units that leave B: (slice * units + number, values)."""
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
        places, order = host.selection_places(site.grid, self.numbers[i])
        flat = value.reshape(-1, *site.grid.unit)[order]
        grad, candidates = np.zeros_like(flat), None
        if found is not None:
            grads = np.asarray(found.grad).reshape(-1, *site.grid.unit)
            grad = grads[order]
        if found is not None and found.index is not None:
            there, place = host.selection_places(site.grid, np.asarray(found.index))
            others = np.asarray(found.candidates).reshape(-1, *site.grid.unit)[place]
            candidates = (there, others)
        marks = np.ones(flat.shape[:2], bool)
        return HostLeaf(
            grid=site.grid,
            counts=site.counts,
            path=site.path,
            key=_trees.leaf_key(self.seed, site.path, self.step),
            places=places,
            value=flat,
            grad=grad,
            forward=marks,
            backward=marks,
            candidates=candidates,
        )


def _site(i: int, path: str, index: Index, recipe: Recipe) -> Site:
    counts = PackedLeaf(index.index, index.index, index, path, index.index).counts
    return Site(i, path, index.grid, counts, counts, recipe.method)


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


def _placed_like(new: PyTree, old: PyTree) -> PyTree:
    """Puts arrays where those that they replace were."""
    return jax.tree.map(
        lambda x, was: jax.device_put(x, was.sharding) if was.committed else x, new, old
    )


def _moved(
    state: PyTree,
    fresh: PyTree,
    params: list[_trees.Parameter],
    sources: dict[int, np.ndarray],
    indices: dict[int, Index],
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
        unit = indices[owner].grid.unit
        source = jnp.asarray(sources[owner])
        at = source.reshape(*source.shape, *(1 for _ in unit))
        was = old.reshape(len(source), -1, *unit)
        now = new.reshape(len(source), -1, *unit)
        kept = jnp.take_along_axis(was, jnp.maximum(at, 0), axis=1)
        out.append(jnp.where(at >= 0, kept, now).reshape(new.shape))
    return treedef.unflatten(out)
