"""Statistics of activations whose rows lie on eight devices."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from setting import KINDS, draw, jit, report, wait

import topkast_jax as tk

INPUTS, OUTPUTS, ROWS = 24, 16, 32
TRAVELS = re.compile(r"= (.+?) (?:all-reduce|all-gather|all-to-all)(?:-start)?\(")


def sizes(text: str) -> list[int]:
    """Sizes of the arrays that collectives make."""
    shapes = [
        s for made in TRAVELS.findall(text) for s in re.findall(r"\[([\d,]*)\]", made)
    ]
    return [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]


def run(full: bool) -> None:
    """The gradient of the taps on a data mesh against one device."""
    del full
    model, x = nn.Dense(OUTPUTS), draw(0, ROWS, INPUTS)
    params = model.init(jax.random.key(0), x)["params"]
    mesh = jax.make_mesh((8,), ("data",), (KINDS["auto"],))
    for candidates, kind in (("grabo", "norms"), ("graest", "sketches")):
        tx = tk.sparse(optax.sgd(0.1), tk.gse(0.5, candidates=candidates))
        state = tx.init(params)

        def stats(x: Any, tx: Any = tx, state: Any = state) -> Any:
            def loss(zeros: Any) -> Any:
                alpha = tk.tap(
                    tk.sparsify(params, tk.masks(state)), zeros, jax.random.key(1)
                )
                return jnp.sum(jnp.sin(tk.flax.apply(model)({"params": alpha}, x)))

            return jax.grad(loss)(tk.taps(tx, params, state))

        alone = wait(jit(stats)(x))
        spread = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        compiled = jit(stats).lower(spread).compile()
        found = wait(compiled(spread))
        near = jax.tree.map(
            lambda a, b: bool(np.allclose(a, b, rtol=1e-4, atol=1e-4)), alone, found
        )
        travelled = sizes(compiled.as_text())
        report(
            kind,
            {
                "near": all(jax.tree.leaves(near)),
                "largest": max(travelled, default=10**9),
            },
        )
