"""What the suites on eight fake devices share: meshes, parameters, methods, reports."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compilation import fast_compilation
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk

COMPILATION = fast_compilation()
IN, HIDDEN, OUT, ROWS, STACK = 64, 128, 32, 16, 2
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LAYOUTS = {
    "fsdp": ((8,), ("fsdp",), P("fsdp", None)),
    "tensor": ((8,), ("tensor",), P(None, "tensor")),
    "both": ((4, 2), ("fsdp", "tensor"), P("fsdp", "tensor")),
}
REFRESH = 2
CORNERS = [
    ("both", "auto"),
    ("both", "explicit"),
    ("fsdp", "auto"),
    ("tensor", "explicit"),
]
"""Each layout and each kind of mesh; a full run takes every pair."""


class Place(NamedTuple):
    """A mesh and how a kernel (its last two axes) lies on it."""

    mesh: Mesh
    kernel: P

    def spec(self, x: Any) -> P:
        """Biases are replicated; the stack axis of a stacked kernel is not split."""
        rank = jnp.ndim(x)
        return P(*[None] * rank) if rank < 2 else P(*[None] * (rank - 2), *self.kernel)

    def shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self.spec(x)), tree)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())


def place(layout: str, kind: str) -> Place:
    shape, names, spec = LAYOUTS[layout]
    return Place(jax.make_mesh(shape, names, (KINDS[kind],) * len(names)), spec)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    return jax.jit(function, compiler_options=COMPILATION, **options)


def report(check: str, result: Any) -> None:
    print(json.dumps({"check": check, "result": result}), flush=True)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters() -> dict[str, Any]:
    return {
        "one": {"kernel": draw(0, IN, HIDDEN) / 8, "bias": draw(1, HIDDEN) / 8},
        "stack": {"kernel": draw(2, STACK, HIDDEN, HIDDEN) / 16},
        "two": {"kernel": draw(3, HIDDEN, OUT) / 16},
    }


AXES = {"stack/kernel": "s i o"}


def methods() -> dict[str, tk.Method]:
    due, penalty = tk.every(REFRESH), 2.0**-10
    kast: dict[str, Any] = {"refresh": due, "penalty": penalty}
    return {
        "top_kast": tk.top_kast(0.75, 0.5, **kast),
        "top_kast_random": tk.top_kast(0.75, 0.5, explore="random", **kast),
        "set": tk.set_(0.75, refresh=due),
        "rigl": tk.rigl(0.75, refresh=due),
        "gse": tk.gse(0.75, refresh=due, drop_fraction=0.3),
    }


def dynamic() -> dict[str, tk.Method]:
    """Those with a memory, with numbers that cross parameters, and with noise."""
    due: dict[str, Any] = {"refresh": tk.every(REFRESH)}
    return {
        "snfs": tk.snfs(0.75, momentum=0.5, **due),
        "dsr": tk.dsr(0.75, threshold=0.0625, **due),
        "deep_r": tk.deep_r(0.75, l1=0.0625, temperature=2.0**-5, **due),
        "srigl": tk.srigl(0.75, gamma_sal=0.9, **due),
        "mest": tk.mest(0.75, weight=0.5, **due),
        "rigl_itop": tk.rigl_itop(0.75, **due),
        "granet": tk.granet(0.75, start=0, stop=8, **due),
        "acdc": tk.acdc(
            0.75, warmup=REFRESH, compressed=2 * REFRESH, dense=REFRESH, last=99
        ),
    }


def same_bits(first: Any, second: Any) -> bool:
    """Equal trees of arrays, wherever they lie."""
    one, two = jax.tree.flatten(first), jax.tree.flatten(second)
    return one[1] == two[1] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(one[0], two[0], strict=True)
    )


def strays(tree: Any, shardings: Any) -> list[str]:
    """Paths of the arrays that do not lie where they should."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    wanted = jax.tree.leaves(shardings)
    return [
        jax.tree_util.keystr(keys)
        for (keys, leaf), want in zip(flat, wanted, strict=True)
        if not leaf.sharding.is_equivalent_to(want, leaf.ndim)
    ]


COMPILED = Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.update([event])
)


def compilations() -> int:
    """Programs that XLA has compiled so far.

    Not the size of a jit's cache: that grows when a sharding is written in another way.
    """
    return COMPILED["/jax/core/compile/backend_compile_duration"]


def wait(tree: Any) -> Any:
    return jax.block_until_ready(tree)
