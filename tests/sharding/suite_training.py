"""Training on eight devices against one, and the step that others compile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from setting import (
    AXES,
    IN,
    KINDS,
    LAYOUTS,
    OUT,
    ROWS,
    STACK,
    draw,
    jit,
    methods,
    parameters,
    place,
    report,
    strays,
    wait,
)

import topkast_jax as tk


def loss_of(alpha: Any, x: Any, y: Any, gather: bool) -> jax.Array:
    """A residual network; `gather` asks for whole weights first, as Explicit needs."""
    if gather:
        alpha = jax.tree.map(lambda w: jax.reshard(w, P(*[None] * w.ndim)), alpha)
    h = jnp.tanh(x @ alpha["one"]["kernel"] + alpha["one"]["bias"][None])
    for i in range(STACK):
        h = h + jnp.tanh(h @ alpha["stack"]["kernel"][i])
    return jnp.mean((h @ alpha["two"]["kernel"] - y) ** 2)


def train_step(tx: Any, gather: bool, sparse: bool = True) -> Callable[..., Any]:
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        masks = tk.masks(state) if sparse else None

        def loss(theta: Any) -> jax.Array:
            alpha = tk.sparsify(theta, masks) if sparse else theta
            return loss_of(alpha, x, y, gather)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def data(step: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(200 + step, ROWS, IN), draw(300 + step, ROWS, OUT)


def run(full: bool) -> None:
    """Losses of 20 steps: the sharded run against one device, from equal states."""
    cells = [("rigl", "both", "explicit")]
    if full:
        cells = [(m, a, b) for m in methods() for a in LAYOUTS for b in KINDS]
    for name, layout, kind in cells:
        here = place(layout, kind)
        tx = tk.sparse(optax.adamw(0.01), methods()[name], axes=tk.axes(AXES))
        params = jax.tree.map(jnp.asarray, parameters())
        alone = jit(train_step(tx, False))
        batch_spec = NamedSharding(here.mesh, P(here.mesh.axis_names[0], None))
        spread_shardings = here.shardings(params)
        wanted = tk.state_shardings(
            jax.eval_shape(tx.init, params), params, spread_shardings, here.replicated
        )
        worst, unequal = 0.0, []
        first, lost = [], set()
        with jax.set_mesh(here.mesh):
            params = jax.device_put(params, spread_shardings)
            state = wait(jit(tx.init, out_shardings=wanted)(params))
            spread = jit(train_step(tx, kind == "explicit"))
            for t in range(20):
                x, y = data(t % 4)
                host = jax.tree.map(np.asarray, (params, state))
                batch = jax.device_put((x, y), batch_spec)
                params, state, loss = wait(spread(params, state, *batch))
                first.append((host, float(loss)))
                lost |= set(strays(params, spread_shardings))
                lost |= set(strays(state, wanted))
        for t, (host, loss) in enumerate(first):
            after, _, alone_loss = wait(alone(*host, *data(t % 4)))
            worst = max(worst, abs(loss - float(alone_loss)) / abs(float(alone_loss)))
            if t + 1 < len(first):
                near = jax.tree.map(
                    lambda a, b: bool(np.allclose(a, b, rtol=1e-3, atol=1e-5)),
                    after,
                    first[t + 1][0][0],
                )
                if not all(jax.tree.leaves(near)):
                    unequal.append(t)
        losses = [loss for _, loss in first]
        # On Auto meshes XLA may split a bias, which is replicated and dense, by itself.
        report(
            f"{name}/{layout}/{kind}",
            {
                "worst": worst,
                "losses": [losses[0], losses[-1]],
                "unequal": unequal,
                "strays": sorted(path for path in lost if "bias" not in path),
            },
        )
