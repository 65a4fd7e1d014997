"""The selectors on one device and on eight, from equal inputs."""

from typing import Any

import jax
import numpy as np
from setting import (
    CORNERS,
    HIDDEN,
    IN,
    KINDS,
    LAYOUTS,
    STACK,
    draw,
    jit,
    place,
    report,
    same_bits,
    strays,
    wait,
)

import topkast_jax as tk


def run(full: bool) -> None:
    """The selectors, from equal inputs."""
    rounded = np.round(draw(5, IN, HIDDEN), 1)  # full of ties
    stacked = np.round(draw(6, STACK, IN, HIDDEN), 1)
    key = jax.random.key(11, impl="threefry2x32")
    roles = tk.Axes((0,), (), (1,), (2,))

    def select(flat: Any, stack: Any) -> dict[str, Any]:
        tree = {"flat": flat, "stack": stack}
        return {
            "top_k": tk.top_k(flat, 1000),
            "top_k_random_ties": tk.top_k(flat, 1000, key=key),
            "top_k_slices": tk.top_k(stack, 777, (1, 2)),
            "top_k_tree": tk.top_k_tree(tree, 5001),
            "random_k": random(flat.shape, None),
            "random_k_slices": random(stack.shape, roles),
        }

    def random(shape: tuple[int, ...], roles: Any) -> jax.Array:
        return tk.random_k(key, 1234, shape, roles)

    alone = wait(jit(select)(rounded, stacked))
    counts = {
        "top_k": 1000,
        "top_k_random_ties": 1000,
        "top_k_slices": 777 * STACK,
        "top_k_tree": 5001,
        "random_k": 1234,
        "random_k_slices": 1234 * STACK,
    }
    for name, k in counts.items():
        chosen = sum(int(np.sum(m)) for m in jax.tree.leaves(alone[name]))
        report(f"count/{name}", [chosen, k])
    pairs = [(a, b) for a in LAYOUTS for b in KINDS] if full else CORNERS
    for layout, kind in pairs:
        here = place(layout, kind)
        inputs = jax.device_put((rounded, stacked), here.shardings((rounded, stacked)))
        with jax.set_mesh(here.mesh):
            spread = wait(jit(select)(*inputs))
        for name in counts:
            report(
                f"equal/{kind}/{layout}/{name}",
                same_bits(alone[name], spread[name]),
            )
        scored = ("top_k", "top_k_random_ties", "top_k_slices", "top_k_tree")
        of_scores = {name: spread[name] for name in scored}
        report(f"strays/{kind}/{layout}", strays(of_scores, here.shardings(of_scores)))
