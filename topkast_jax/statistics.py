"""Statistics of a layer's inputs and cotangents, as gradients of zeros.

A tap stands beside a kernel of alpha. The layer's result goes through `observe`, which
changes nothing, and gives as the tap's gradient what it saw: of h [in, batch] and delta
[out, batch] the sums over the batch of magnitudes, or of values with random signs. So
they come out of the same backward pass, are added up where a layer is called several
times, and by jit over devices that hold other rows. Nothing is larger than in + out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax import plan as plan_lib
from topkast_jax._types import Axes, PyTree
from topkast_jax.layouts.packed import Index
from topkast_jax.transformation import recipe_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "outputs"],
    meta_fields=["signed"],
)
@dataclasses.dataclass(frozen=True)
class Taps:
    """Zeros for one parameter, and, as their gradient, its statistics.

    Attributes:
      inputs: float32, shaped like the parameter, but for 1 along its outputs.
      outputs: float32, with 1 along window and inputs.
      signed: whether they are sums with random signs, or of magnitudes.
    """

    inputs: Any
    outputs: Any
    signed: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "taps", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A kernel with its taps, as `tk.flax.apply` takes it.

    Attributes:
      value: an array, or a `BlockMatrix`.
      taps: its `Taps`.
      key: uint32 [*stack or ones, 2] from which signs are drawn; None without signs.
    """

    value: Any
    taps: Taps
    key: Any


def taps(
    tx: optax.GradientTransformation, params: PyTree, opt_state: optax.OptState
) -> PyTree:
    """Zeros whose gradient is what `tx.update(..., stats=...)` takes.

    Args:
      tx: `tk.sparse(...)`, of a method that draws by statistics, as `tk.gse`.
      params: the parameters of any layout, or their shapes.
      opt_state: that belongs to them.
    Returns:
      Tree like `params`, `Taps` at sparse leaves of such a method, None elsewhere.
    Example:
      >>> import flax.linen as nn, topkast_jax as tk
      >>> model, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = tk.sparse(optax.sgd(0.1), tk.gse(0.5, candidates="grabo"))
      >>> state = tx.init(params)
      >>> def loss(theta, zeros):
      ...     alpha = tk.tap(tk.sparsify(theta, tk.masks(state)), zeros)
      ...     return tk.flax.apply(model)({"params": alpha}, x).sum()
      >>> zeros = taps(tx, params, state)
      >>> grads, stats = jax.grad(loss, argnums=(0, 1))(params, zeros)
      >>> stats["kernel"].inputs.ravel().tolist()  # |h| 1, over five rows
      [5.0, 5.0, 5.0, 5.0]
      >>> updates, state = tx.update(grads, state, params, stats=stats)
    """
    recipe = recipe_of(tx, "tk.taps")
    flat, treedef = _trees.parameters(params)
    forward = treedef.flatten_up_to(_trees.masks(opt_state).forward)
    read: dict[int, tuple[tuple[int, ...], Axes]] = {
        i: (index.grid.shape, index.grid.axes)
        for i, index in enumerate(forward)
        if isinstance(index, Index)
    }
    if not read:
        for site in plan_lib.sites(recipe.method, recipe.axes, flat):
            read[site.index] = site.grid.shape, site.axes
    found: list[Taps | None] = [None] * len(flat)
    for i, (shape, axes) in read.items():
        method = plan_lib.method_of(recipe.method, flat[i].path)
        if method is None or method.statistics is None:
            continue
        sides = (axes.outputs, axes.window + axes.inputs)
        zeros = [
            jnp.zeros([1 if a in gone else n for a, n in enumerate(shape)])
            for gone in sides
        ]
        found[i] = Taps(zeros[0], zeros[1], method.statistics == "sketches")
    return treedef.unflatten(found)


def tap(alpha: PyTree, taps: PyTree, key: jax.Array | None = None) -> PyTree:
    """alpha with a tap at each kernel that has one, for `tk.flax.apply`.

    Args:
      alpha: from `tk.sparsify`, of any layout.
      taps: from the function of that name.
      key: another one at every step, for signs (GraEst).
    Returns:
      Tree like `alpha`, with `Tapped` leaves.
    Raises:
      ValueError: signs are wanted, and there is no key.
    """

    def one(keys: Any, tap: Taps | None, value: Any) -> Any:
        if tap is None:
            return value
        if not tap.signed:
            return Tapped(value, tap, None)
        if key is None:
            raise ValueError(
                "tk.tap: random signs are drawn anew at every step; pass key=..."
            )
        name = _trees.path_id(_trees.path_name(keys))
        words = jax.random.bits(jax.random.fold_in(key, name), (2,), jnp.uint32)
        pairs = zip(tap.inputs.shape, tap.outputs.shape, strict=True)
        # Where neither is 1 there may be a stack, which a scan cuts.
        lead = [min(a, b) for a, b in pairs]
        return Tapped(value, tap, jnp.broadcast_to(words, (*lead, 2)))

    return jax.tree_util.tree_map_with_path(
        one, taps, alpha, is_leaf=lambda x: x is None or isinstance(x, Taps)
    )


def observe(x: Any, y: Any, tapped: Tapped) -> Array:
    """y = x @ W as it is, and as the gradient of W's taps what it saw of both.

    For layers that are not of Flax: `y = tk.observe(x, x @ kernel.value, kernel)`.
    Reverse mode only.

    Args:
      x: [..., inputs], the window and several axes of inputs in one.
      y: [..., outputs] of the same rows.
      tapped: a leaf of `tap`, of one slice.
    Returns:
      y.
    Example:
      >>> zeros = Taps(jnp.zeros((2, 1)), jnp.zeros((1, 3)), signed=False)
      >>> x, w = jnp.array([[1.0, -2.0], [3.0, 0.0]]), jnp.ones((2, 3))
      >>> found = jax.grad(lambda z: observe(x, x @ w, Tapped(w, z, None)).sum())(zeros)
      >>> found.inputs.ravel().tolist(), found.outputs.ravel().tolist()
      ([4.0, 2.0], [2.0, 2.0, 2.0])
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    rows = tuple(range(x.ndim - 1))
    signs = None
    if tapped.key is None:
        found = norms(x, rows)
    else:
        signs = draw_signs(tapped, x, x.shape[:-1])[..., None]
        found = jnp.sum(lax.stop_gradient(x) * signs, axis=rows)
    return watch(y, tapped, found, signs, rows, (0,))


def norms(x: Array, rows: tuple[int, ...]) -> Array:
    """Sums of magnitudes over rows, in float32."""
    return jnp.sum(jnp.abs(lax.stop_gradient(x)), axis=rows, dtype=jnp.float32)


def draw_signs(tapped: Tapped, x: Array, shape: tuple[int, ...]) -> Array:
    """Random signs, float32: others for every x, so that sums over calls stay unbiased.

    Args:
      tapped: gives the key.
      x: what the layer is called with; its bits go into the key.
      shape: of the rows.
    """
    bits = lax.bitcast_convert_type(
        lax.stop_gradient(x).astype(jnp.float32), jnp.uint32
    )
    words = jnp.reshape(tapped.key, (-1, 2))[0]
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.rademacher(key, shape, jnp.float32)


def watch(
    y: Array,
    tapped: Tapped,
    found: Array,
    signs: Array | None,
    rows: tuple[int, ...],
    order: tuple[int, ...],
) -> Array:
    """y, whose cotangent is summed for the taps.

    Args:
      y: result of a layer.
      tapped: whose taps get a gradient.
      found: the sums over x, in the order of the kernel's axes.
      signs: that broadcast against y; None sums magnitudes.
      rows: axes of y to sum over.
      order: of the other axes of y, as the kernel has them.
    """
    how = _How(rows, order, np.shape(tapped.taps.outputs))
    found = found.astype(jnp.float32).reshape(np.shape(tapped.taps.inputs))
    return _watched(how, y, tapped.taps, found, signs)


@dataclasses.dataclass(frozen=True)
class _How:
    rows: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(
    how: _How, y: Array, taps: Taps, found: Array, signs: Array | None
) -> Array:
    del how, taps, found, signs
    return y


def _watched_fwd(
    how: _How, y: Array, taps: Taps, found: Array, signs: Array | None
) -> Any:
    del how, taps
    return y, (found, signs)


def _watched_bwd(how: _How, residuals: Any, dy: Array) -> Any:
    found, signs = residuals
    seen = jnp.abs(dy.astype(jnp.float32)) if signs is None else dy * signs
    summed = jnp.sum(seen, axis=how.rows, dtype=jnp.float32)
    outputs = summed.transpose(how.order).reshape(how.shape)
    nothing = None if signs is None else jnp.zeros_like(signs)
    taps = Taps(found, outputs, signs is not None)
    return dy, taps, jnp.zeros_like(found), nothing


_watched.defvjp(_watched_fwd, _watched_bwd)
