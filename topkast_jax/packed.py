"""Training with packed arrays: its start and its update.

The device holds B alone, and so does the optimizer. What a method keeps beyond B, its
reservoir, lives in a `Store` in host memory. Masks change the arrays themselves, so a
refresh is a function of its own, between two updates: refresh.py.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from topkast_jax import _trees, faults
from topkast_jax import plan as plan_lib
from topkast_jax._types import LeafMasks, Masks, PyTree, SparseState
from topkast_jax.layouts import host
from topkast_jax.layouts import share as shares
from topkast_jax.layouts import store as stores
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.share import Share
from topkast_jax.layouts.store import Store
from topkast_jax.plan import Site
from topkast_jax.sets import is_due, statistics, tree_of, view
from topkast_jax.sharding import packed_sharding, state_shardings
from topkast_jax.transformation import Recipe, Sparse, recipe_of

P: Any = PartitionSpec


def transformation(recipe: Recipe) -> Sparse:
    """`tk.sparse` in the packed layout; its state comes from `tk.start`."""
    inner = recipe.inner

    def init_fn(params: PyTree) -> Any:
        del params
        raise ValueError(
            f"layout={recipe.layout!r} changes the arrays that are trained: begin with "
            "theta, opt_state, store = tk.start(tx, params), not with tx.init; nothing "
            "can enclose this transformation, so MultiSteps and the like go inside"
        )

    def update_fn(
        updates: PyTree,
        state: SparseState,
        params: PyTree = None,
        *,
        stats: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError("tk.sparse: update needs the parameters")
        flat, treedef = _trees.parameters(params)
        raw = treedef.flatten_up_to(updates)
        indices = treedef.flatten_up_to(state.sparse_masks.forward)
        memory = treedef.flatten_up_to(state.sparse_memory)
        step = state.sparse_step
        sparse = [i for i, index in enumerate(indices) if index is not None]
        methods = {i: recipe.method_of(flat[i].path) for i in sparse}
        given = statistics(methods.values(), treedef, stats)

        def leaf(i: int) -> PackedLeaf:
            path = flat[i].path
            key = _trees.leaf_key(state.sparse_seed, path, step)
            rate = recipe.rate(step)
            theta = jnp.asarray(flat[i].array)
            return PackedLeaf(theta, raw[i], indices[i], path, key, memory[i], rate)

        inward = list(raw)
        for i, method in methods.items():
            if method.observe is not None:
                memory[i] = method.observe(raw[i], memory[i])
            if method.penalty is not None:
                inward[i] = raw[i] + method.penalty(leaf(i)).astype(raw[i].dtype)
        outward, inner_state = inner.update(
            treedef.unflatten(inward), state.sparse_inner, params, **extra
        )
        u = treedef.flatten_up_to(outward)
        for i, method in methods.items():
            if method.adjust is not None:
                u[i] = method.adjust(u[i], leaf(i), memory[i])
        bad = jnp.stack([faults.count(g)[0] for g in raw])
        drawn = _draws(recipe, flat, indices, state.sparse_seed, step + 1, given)
        masks = state.sparse_masks._replace(probe=tree_of(treedef, drawn))
        return treedef.unflatten(u), state._replace(
            sparse_step=jnp.asarray(optax.safe_increment(step)),
            sparse_masks=masks,
            sparse_memory=treedef.unflatten(memory),
            sparse_inner=inner_state,
            **faults.first_nonfinite(state, flat, bad),
        )

    return Sparse(init_fn, update_fn, recipe)


def _draws(
    recipe: Recipe,
    flat: list[_trees.Parameter],
    indices: Sequence[Any],
    seed: Any,
    step: Any,
    stats: Sequence[Any],
) -> dict[int, Array]:
    """P of a step as `Masks` keeps it, -1 throughout where no refresh comes after it."""
    found = {}
    for i, index in enumerate(indices):
        method = recipe.method_of(flat[i].path) if isinstance(index, Index) else None
        if method is None or method.candidates is None:
            continue
        now = is_due(method, jnp.int32(1) + step)
        key = _trees.leaf_key(seed, flat[i].path, step)
        leaf = PackedLeaf(None, None, index, flat[i].path, key, stats=stats[i])
        made = functools.partial(method.candidates, leaf, (), step)
        nothing = jnp.full(jax.eval_shape(made).shape, -1, jnp.int32)
        turn = functools.partial(lambda made, _: made(), made)
        found[i] = faults.when(now, turn, nothing)
    return found


def fan_in_normal(key: jax.Array, index: Index, dtype: Any) -> Array:
    """Normal draws of variance 1 / inputs, the dense layer's; see `tk.start`.

    Args:
      key: PRNG key.
      index: which units are drawn; `index.stored` is the shape to return.
      dtype: of the values.
    """
    scale = index.grid.matrix_shape[0] ** -0.5
    return scale * jax.random.normal(key, index.stored, dtype)


def start(
    tx: optax.GradientTransformation,
    params: PyTree,
    initial: Callable[[jax.Array, Index, Any], Array] = fan_in_normal,
    reservoir: str | os.PathLike[str] | None = None,
    shardings: PyTree = None,
) -> tuple[PyTree, optax.OptState, Store]:
    """Packs parameters: what is trained, its optimizer state, and the reservoir.

    Packed parameters have fewer axes than dense ones. Masks and labels of the inner
    optimizer that go by `ndim` (which weights decay) must be made from the dense ones.

    With several processes, all of them call it, and say where the dense parameters would
    lie. Each then makes its own shards, selects in the slices that its devices hold, and
    keeps their theta; what is returned lies over all devices.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      params: the dense parameters, arrays of NumPy or JAX; or a function without
        arguments that makes them under jit, whose leaves are then made one at a time,
        so that they never exist all together. Without a reservoir a sparse leaf may be
        a jax.ShapeDtypeStruct: nothing as large as it is made, here or later.
      initial: `(key, index, dtype) -> values` of sparse leaves that are only shapes.
      reservoir: folder of files that are mapped into memory, for a theta larger than
        that; None keeps it in memory. A reservoir that is there is overwritten. Each of
        several processes has a folder of its own inside.
      shardings: tree of NamedSharding that the dense parameters would have; None leaves
        theta wherever JAX puts it, or takes those of parameters over several processes.
    Returns:
      theta: tree like `params`, sparse leaves [*stack, k_B] in place of dense arrays.
      opt_state: the state that `tx.update` takes.
      store: theta in host memory, for methods with a reservoir.
    Raises:
      ValueError: another layout, a shape where values are needed, shardings that cut a
        parameter elsewhere than between its groups, or as `tx.init`.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.5, 0.25), layout="packed")
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> theta, opt_state, store = tk.start(tx, params)
      >>> theta["kernel"].tolist()  # A, then the rest of B
      [3.0, -4.0, -2.0]
    """
    recipe = recipe_for(tx, "tk.start")
    shapes = jax.eval_shape(params) if callable(params) else params
    flat, treedef = _trees.parameters(shapes)
    found = plan_lib.sites(recipe.method, recipe.axes, flat)
    sites = {site.index: site for site in found}
    seed = jnp.asarray(recipe.seed, jnp.uint32)
    theta: list[Any] = []
    indices: dict[int, Index] = {}
    memory: dict[int, Any] = {}
    if reservoir is not None:
        reservoir = stores.of_process(reservoir)
    store = stores.create(reservoir if recipe.method.reservoir else None)
    lies = _dense_shardings(flat, treedef, shardings)
    for i, parameter in enumerate(flat):
        dense = parameter.array
        if callable(params):
            dense = _made(params, treedef, i, lies[i])
        only_shape = isinstance(dense, jax.ShapeDtypeStruct)
        if only_shape and (i not in sites or sites[i].method.reservoir):
            why = "the reservoir keeps them" if i in sites else "it is kept dense"
            raise ValueError(
                f"{parameter.path!r} is only a shape, but its values are needed: {why}"
            )
        if i not in sites:
            placed = (
                jnp.asarray(dense) if lies[i] is None else shares.put(dense, lies[i])
            )
            theta.append(placed)
            continue
        site, share = sites[i], shares.whole(sites[i].grid)
        if lies[i] is not None:
            share = shares.of(site.grid, packed_sharding(site.path, site.grid, lies[i]))
        units = None if only_shape else share.units(dense, lies[i])
        if site.method.reservoir and units is not None:
            units = stores.add(store, site.path, units, share.of)
        del dense
        leaf = host_leaf(site, seed, 0, units, share, parameter.array.dtype)
        masks, own = site.method.init(leaf)
        memory[i] = jax.tree.map(jnp.asarray, own)
        numbers = host.numbered(site.grid, masks, len(share.own))
        indices[i] = indexed(numbers, masks, share, recipe)
        if units is None:
            key = jax.random.fold_in(leaf.key, _INITIAL)
            theta.append(_drawn(initial, key, indices[i], leaf.value.dtype, share))
        else:
            theta.append(taken(units, numbers, share))
    packed = treedef.unflatten(theta)
    _require_slots(recipe, shapes, packed, [flat[i] for i in sites])

    def state(packed: PyTree) -> SparseState:
        return state_of(recipe, seed, treedef, indices, memory, packed)

    if not any(lies):
        return packed, state(packed), store
    everywhere = NamedSharding(lies[0].mesh, P())
    of_theta = jax.tree.map(lambda x: x.sharding, packed)
    abstract = jax.eval_shape(state, packed)
    of_state = state_shardings(abstract, packed, of_theta, everywhere)
    inner = of_state.sparse_inner
    made = state_of(recipe, seed, treedef, indices, memory, packed, inner)
    return packed, jax.tree.map(_put_unless_there, made, of_state), store


def _put_unless_there(x: Any, sharding: Any) -> Any:
    there = isinstance(x, jax.Array) and x.sharding == sharding
    return x if there else shares.put(x, sharding)


def _dense_shardings(
    flat: list[_trees.Parameter], treedef: Any, shardings: PyTree
) -> list[Any]:
    """NamedSharding of every dense parameter, None for each where none were given."""
    lie = [getattr(p.array, "sharding", None) for p in flat]
    if shardings is not None:
        lie = treedef.flatten_up_to(shardings)
    elif all(getattr(p.array, "is_fully_addressable", True) for p in flat):
        return [None] * len(flat)
    for p, sharding in zip(flat, lie, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"tk.start: the sharding of {p.path!r} is {sharding}, which tells of no "
                "mesh; give every parameter a jax.sharding.NamedSharding of one mesh"
            )
    return lie


def _drawn(
    initial: Callable[[jax.Array, Index, Any], Array],
    key: jax.Array,
    index: Index,
    dtype: Any,
    share: Share,
) -> Array:
    """Initial values, made where they will lie; no mesh changes them."""
    if share.sharding is None:
        return initial(key, index, dtype)

    def make(key: jax.Array, index: Index) -> Array:
        return initial(key, index, dtype)

    return jax.jit(make, out_shardings=share.sharding)(key, index)


def _require_slots(
    recipe: Recipe, dense: PyTree, packed: PyTree, sparse: list[_trees.Parameter]
) -> None:
    """Raises ValueError where an optimizer's state cannot follow a refresh.

    An array of the state must belong to a parameter by its path, and a packed parameter
    must be treated as the dense one is, whatever its rank.
    """

    def kept(params: PyTree) -> list[tuple[str, Any]]:
        state = jax.eval_shape(recipe.inner.init, params)
        return [
            (_trees.path_name(keys), leaf)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
            if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]

    paths = [p.path for p in _trees.parameters(dense)[0]]
    values = {p.path: p.array.size for p in _trees.parameters(packed)[0]}
    least = min(values[p.path] for p in sparse)
    found = kept(packed)
    for name, leaf in found:
        if leaf.size >= least and not any(ends(name, path) for path in paths):
            raise ValueError(
                f"the inner optimizer keeps an array of shape {leaf.shape} at {name!r} "
                "that belongs to no parameter (optax.flatten does so): nothing tells "
                'which entries it is about when they move; use layout="masked"'
            )
    before = kept(dense)
    for p in sparse:
        was, now = (sum(ends(n, p.path) for n, _ in some) for some in (before, found))
        if was != now:
            raise ValueError(
                f"the inner optimizer keeps {was} arrays for {p.path!r} when it is dense, "
                f"and {now} when it is packed: it goes by the number of axes (as muon "
                'does), and packed parameters have one; use layout="masked"'
            )


def ends(name: str, path: str) -> bool:
    """Whether the name of an array in a state ends with the path of a parameter."""
    return name == path or name.endswith(f"/{path}")


def shapes(
    tx: optax.GradientTransformation,
    params: PyTree,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[PyTree, optax.OptState]:
    """Shapes of theta and opt_state, as `tk.start` makes them; nothing is computed.

    For compiling ahead of time, and for restoring a checkpoint.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      params: the dense parameters, or their shapes.
      sizes: `{path: (n_A, n_B)}` per slice where they are not those of the start, as
        after the `stop` of Top-KAST; see `tk.Index`.
    Returns:
      Trees of jax.ShapeDtypeStruct.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.static(0.9), layout="packed")
      >>> theta, opt_state = shapes(tx, {"kernel": jnp.ones((30, 10))})
      >>> theta["kernel"].shape
      (30,)
    """
    recipe = recipe_for(tx, "tk.shapes")
    flat, treedef = _trees.parameters(params)
    struct: Any = jax.ShapeDtypeStruct
    theta = [struct(jnp.shape(p.array), p.array.dtype) for p in flat]
    indices: dict[int, Index] = {}
    found = plan_lib.sites(recipe.method, recipe.axes, flat)
    dense = [theta[site.index] for site in found]
    if unknown := sorted(set(sizes or {}) - {site.path for site in found}):
        raise ValueError(f"tk.shapes: sizes for {unknown[0]!r}, which is not sparse")
    for site in found:
        each = site.grid.selections
        first, second = (each * k for k in site.counts)
        first, second = (sizes or {}).get(site.path, (first, second))
        shape = (*site.grid.stack, second)
        index = struct(shape, jnp.int32)
        indices[site.index] = Index(index, site.grid, first, recipe.layout == "block")
        theta[site.index] = struct((*shape, *site.grid.unit), theta[site.index].dtype)
    packed = treedef.unflatten(theta)

    def remembered(site: Site, value: Array) -> Any:
        """The memory of a method: of one form in every layout."""
        nothing = LeafMasks(*[jnp.zeros_like(value, bool)] * 2)
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        return site.method.init(view(site, value, nothing, value, seed, 0))[1]

    def state(packed: PyTree) -> SparseState:
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        memory = {
            site.index: remembered(site, jnp.zeros(shape.shape, shape.dtype))
            for site, shape in zip(found, dense, strict=True)
        }
        return state_of(recipe, seed, treedef, {}, memory, packed)

    def drawn() -> Any:
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        return _first_masks(recipe, seed, treedef, indices, packed).probe

    sets = (tree_of(treedef, indices), tree_of(treedef, {}), jax.eval_shape(drawn))
    masks = Masks(*sets)
    return packed, jax.eval_shape(state, packed)._replace(sparse_masks=masks)


def due(tx: optax.GradientTransformation, step: int) -> bool:
    """Whether the masks change before step `step`: whether to call `tk.refresh` now.

    With a `refresh_delay` of d, `tk.choose` is to be called where this holds for step + d.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      step: number of updates made so far.
    """
    recipe = recipe_for(tx, "tk.due")
    schedule, begun = recipe.method.due, step - recipe.delay
    return schedule is not None and begun > 0 and bool(schedule(begun))


def recipe_for(tx: optax.GradientTransformation, caller: str) -> Recipe:
    recipe = recipe_of(tx, caller)
    if recipe.layout == "masked":
        raise ValueError(
            f'{caller} is for layout="packed"; with layout="masked" the masks change '
            "inside tx.update, which starts from tx.init"
        )
    return recipe


def _made(make: Callable[[], PyTree], treedef: Any, i: int, sharding: Any) -> Any:
    """Leaf `i` of the tree that `make` makes; XLA leaves out all the others."""

    def leaf() -> Any:
        return treedef.flatten_up_to(make())[i]

    if sharding is None:
        return np.asarray(jax.jit(leaf)())
    return jax.jit(leaf, out_shardings=sharding)()


_INITIAL = 2**32 - 2
"""Folded into a leaf's key for initial values; no slice has this number."""


def host_leaf(
    site: Site,
    seed: Any,
    step: int,
    units: np.ndarray | None,
    share: Share,
    dtype: Any,
) -> HostLeaf:
    """A leaf over all of theta, [own, units, *unit], or without any entries."""
    rows = host.rows_of(site.grid, share.own)
    value, places = np.zeros((len(rows), 0, *site.grid.unit), dtype), None
    if units is None:
        places = np.zeros((len(rows), 0), np.int64)
    else:
        value = host.by_selection(site.grid, units, share.own)
    marks = np.zeros(value.shape[:2], bool)
    return HostLeaf(
        grid=site.grid,
        counts=site.counts,
        path=site.path,
        key=_trees.leaf_key(seed, site.path, step),
        rows=rows,
        places=places,
        value=value,
        grad=np.zeros((0,), dtype),
        forward=marks,
        backward=marks,
    )


def indexed(
    numbers: np.ndarray, masks: LeafMasks, share: Share, recipe: Recipe
) -> Index:
    k_forward = len(masks.forward) // len(numbers)
    by_unit = recipe.layout == "block"
    return Index(share.place(numbers), share.grid, k_forward, by_unit)


def taken(units: np.ndarray, numbers: np.ndarray, share: Share) -> Array:
    """Some of [own, units, *unit], as packed parameters are stored."""
    return share.place(np.take_along_axis(units, wide(numbers, units), 1))


def wide(index: np.ndarray, units: np.ndarray) -> np.ndarray:
    """An index [slices, n] that take_along_axis can use on units with a shape."""
    return index.reshape(*index.shape, *(1 for _ in units.shape[2:])).astype(np.int64)


def state_of(
    recipe: Recipe,
    seed: Array,
    treedef: Any,
    indices: dict[int, Index],
    memory: dict[int, Any],
    theta: PyTree,
    shardings: PyTree = None,
) -> SparseState:
    """A state of step 0; `shardings` are of its inner state, where it lies on a mesh."""
    init = recipe.inner.init
    if shardings is not None:
        init = jax.jit(init, out_shardings=shardings)
    paths = [p.path for p in _trees.parameters(theta)[0]]
    reservoirs = {
        i: jnp.asarray(recipe.method_of(paths[i]).reservoir) for i in indices or memory
    }
    return SparseState(
        sparse_step=jnp.int32(0),
        sparse_seed=seed,
        sparse_masks=_first_masks(recipe, seed, treedef, indices, theta),
        sparse_memory=tree_of(treedef, memory),
        sparse_reservoir=tree_of(treedef, reservoirs),
        leaks=jnp.int32(0),
        nonfinite_step=jnp.int32(-1),
        nonfinite_leaf=jnp.uint32(0),
        nonfinite_count=jnp.int32(0),
        sparse_inner=init(theta),
    )


def _first_masks(
    recipe: Recipe, seed: Any, treedef: Any, indices: dict[int, Index], theta: PyTree
) -> Masks:
    flat = _trees.parameters(theta)[0]
    each = [indices.get(i) for i in range(len(flat))]
    drawn = _draws(recipe, flat, each, seed, 0, [None] * len(flat))
    return Masks(*(tree_of(treedef, found) for found in (indices, {}, drawn)))
