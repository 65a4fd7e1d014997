"""meProp and SWAT on one device and on eight, from equal inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from setting import CORNERS, HIDDEN, IN, draw, jit, place, report, same_bits, wait

import topkast_jax as tk


def run(full: bool) -> None:
    """Gradients that are products of two numbers each: no rounding, whatever the mesh."""
    del full
    g = np.round(draw(5, IN, HIDDEN) * 4) / 4  # full of ties, and sums are exact
    x = np.round(draw(6, IN, HIDDEN), 1)

    def gradients(g: Any, x: Any) -> dict[str, Any]:
        def loss(y: Any, unified: bool) -> Any:
            return (g * tk.meprop(y, 0.75, unified=unified)).sum()

        def product(w: Any) -> Any:
            return tk.swat(x, w, 0.75, product=jnp.multiply).sum()

        return {
            "rows": jax.grad(loss)(x, False),
            "unified": jax.grad(loss)(x, True),
            "swat": jax.grad(product)(g),
        }

    alone = wait(jit(gradients)(g, x))
    report("kept/rows", int(np.sum(np.asarray(alone["rows"]) != 0)))
    for layout, kind in CORNERS:
        here = place(layout, kind)
        inputs = jax.device_put((g, x), here.shardings((g, x)))
        with jax.set_mesh(here.mesh):
            compiled = jit(gradients).lower(*inputs).compile()
            spread = wait(compiled(*inputs))
        for name, one in alone.items():
            report(f"equal/{kind}/{layout}/{name}", same_bits(one, spread[name]))
        report(f"gathers/{kind}/{layout}", compiled.as_text().count("all-gather("))
