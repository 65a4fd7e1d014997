"""What compiled programs move between eight devices."""

import math
import re
from collections import Counter
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from setting import (
    AXES,
    KINDS,
    LAYOUTS,
    Place,
    dynamic,
    jit,
    methods,
    parameters,
    place,
    report,
)
from suite_training import data, train_step

import topkast_jax as tk

MOVERS = ("all-gather", "all-to-all", "collective-permute")
CALL = re.compile(rf"= (.*?) ({'|'.join(MOVERS)})(?:-start)?\(")
ARRAY = re.compile(r"\w+\[([\d,]*)\]")


def moved_arrays(text: str) -> list[int]:
    """Sizes, in entries, of the outputs of all collectives that move whole arrays."""
    sizes = []
    for result, _ in CALL.findall(text):
        outputs = ARRAY.findall(result)
        sizes.append(
            max(
                math.prod(map(int, dims.split(",") if dims else [])) for dims in outputs
            )
        )
    return sorted(sizes, reverse=True)


def abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def compiled(
    tx: Any, here: Place, gather: bool, sparse: bool, only_update: bool
) -> str:
    params = parameters()
    spread = here.shardings(params)
    theta = abstract(params, spread)
    state = jax.eval_shape(tx.init, params)
    wanted = tk.state_shardings(state, params, spread, here.replicated)
    state = abstract(state, wanted)
    if only_update:
        program, rest = tx.update, (state, theta)
        return jit(program).lower(theta, *rest).compile().as_text()
    batch = NamedSharding(here.mesh, P(here.mesh.axis_names[0], None))
    x, y = abstract(data(0), (batch, batch))
    step = train_step(tx, gather, sparse)
    return jit(step).lower(theta, state, x, y).compile().as_text()


def run(full: bool) -> None:
    """What is moved between devices, beside the dense step with the same sharding."""
    adam = optax.adam(0.01)
    smallest = min(p.size for p in jax.tree.leaves(parameters()) if p.ndim > 1)
    cells = [
        ("auto", ["rigl", "gse"]),
        ("explicit", ["top_kast_random"]),
    ]
    every = methods() | dynamic()
    if full:
        cells = [(kind, list(every)) for kind in KINDS]
    for kind, names in cells:
        here = place("both", kind)
        for name in names:
            axes = tk.axes(AXES)
            tx = tk.sparse(adam, every[name], axes=axes, learning_rate=0.01)
            with jax.set_mesh(here.mesh):
                text = compiled(tx, here, False, True, only_update=True)
            report(
                f"update/{name}/{kind}",
                {
                    "moved": moved_arrays(text),
                    "smallest_weight": smallest,
                    "reductions": len(re.findall(r" all-reduce(?:-start)?\(", text)),
                },
            )
    pairs = [("auto", "fsdp"), ("explicit", "both")]
    if full:
        pairs = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
    for kind, layout in pairs:
        here, gather = place(layout, kind), kind == "explicit"
        tx = tk.sparse(adam, methods()["top_kast"], axes=tk.axes(AXES))
        with jax.set_mesh(here.mesh):
            dense = moved_arrays(compiled(adam, here, gather, False, False))
            sparse = moved_arrays(compiled(tx, here, gather, True, False))
        extra = Counter(n for n in sparse if n >= smallest // 8)
        extra -= Counter(dense)
        report(
            f"step/top_kast/{layout}/{kind}",
            {"dense": dense, "sparse": sparse, "extra": sorted(extra.elements())},
        )
