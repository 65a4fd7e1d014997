"""Init, update and refresh on one device and on eight, from equal inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from setting import (
    AXES,
    KINDS,
    LAYOUTS,
    REFRESH,
    Place,
    compilations,
    draw,
    dynamic,
    jit,
    methods,
    parameters,
    place,
    report,
    same_bits,
    strays,
    wait,
)

import topkast_jax as tk


class Step(NamedTuple):
    """`tk.sparse` around an optimizer without rounding, driven by given gradients.

    Powers of two everywhere, so that no fused multiply-add can tell the meshes apart:
    what is compared is the library, not the floating point of the optimizer.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


def exact_step(method: tk.Method) -> tuple[optax.GradientTransformation, Step]:
    inner = optax.sgd(0.25, momentum=0.5)
    axes = tk.axes(AXES)
    tx = tk.sparse(inner, method, seed=5, axes=axes, learning_rate=0.25)

    def update(params: Any, state: Any, dense_grads: Any) -> Any:
        masks = tk.masks(state)
        grads = jax.vjp(lambda p: tk.sparsify(p, masks), params)[1](dense_grads)[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, Step(tx.init, update)


def gradients(step: int) -> Any:
    """Multiples of 1/64: sums of a few of them are exact."""
    return jax.tree.map(
        lambda p: np.round(draw(100 + step, *p.shape) * 16) / 64, parameters()
    )


def trajectory(step: Step, where: Place | None, tx: Any) -> tuple[list[Any], Any]:
    """States and parameters of four updates, and what strayed from its sharding."""
    params = jax.tree.map(jnp.asarray, parameters())
    if where is None:
        init, update, lost = jit(step.init), jit(step.update), None
    else:
        params = jax.device_put(params, where.shardings(params))
        abstract = jax.eval_shape(tx.init, params)
        spread = where.shardings(params)
        wanted = tk.state_shardings(abstract, params, spread, where.replicated)
        init = jit(step.init, out_shardings=wanted)
        update, lost = jit(step.update), set()
    state = wait(init(params))
    seen = [(params, state)]
    before = compilations()
    for t in range(2 * REFRESH):
        if t == 1:
            first, before = compilations() - before, compilations()
        grads = gradients(t)
        if where is not None:
            grads = jax.device_put(grads, where.shardings(grads))
        params, state = wait(update(params, state, grads))
        seen.append((params, state))
        if where is not None:
            lost |= set(strays(params, spread)) | set(strays(state, wanted))
    counted = {"first_step_compiles": first, "later_compiles": compilations() - before}
    return seen, {"strays": sorted(lost or ()), **counted}


def run(full: bool) -> None:
    """Whole init, update and refresh, from equal inputs."""
    pairs = [(a, b) for a in LAYOUTS for b in KINDS]
    cells = [
        ("top_kast", "both", "explicit"),
        ("rigl", "tensor", "auto"),
        ("gse", "fsdp", "explicit"),
        ("deep_r", "both", "auto"),
    ]
    every = methods() | dynamic()
    if full:
        cells = [(m, *pair) for m in every for pair in pairs]
    alone = {}
    for name, layout, kind in cells:
        tx, step = exact_step(every[name])
        if name not in alone:
            alone[name] = trajectory(step, None, tx)[0]
        here = place(layout, kind)
        with jax.set_mesh(here.mesh):
            spread, found = trajectory(step, here, tx)
        pairs = zip(alone[name], spread, strict=True)
        moved = not same_bits(tk.masks(spread[0][1]), tk.masks(spread[-1][1]))
        result = {"equal": [same_bits(a, b) for a, b in pairs], "moved": moved}
        report(f"{name}/{layout}/{kind}", result | found)
