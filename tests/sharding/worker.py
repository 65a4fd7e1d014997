"""Checks on eight fake devices: `python worker.py SUITE [full]` prints a JSON line for each.

Not a test module: test_*.py beside it start it and judge what it prints. Every step is
waited for, since eight fake devices on few cores can deadlock otherwise.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import fast_compilation
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk

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


# Selection ---------------------------------------------------------------------------


def suite_selection(full: bool) -> None:
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


# Init and refresh --------------------------------------------------------------------


class Step(NamedTuple):
    """`tk.sparse` around an optimizer without rounding, driven by given gradients.

    Powers of two everywhere, so that no fused multiply-add can tell the meshes apart:
    what is compared is the library, not the floating point of the optimizer.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


def exact_step(method: tk.Method) -> tuple[optax.GradientTransformation, Step]:
    tx = tk.sparse(optax.sgd(0.25, momentum=0.5), method, seed=5, axes=tk.axes(AXES))

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


def suite_refresh(full: bool) -> None:
    """Whole init, update and refresh, from equal inputs."""
    pairs = [(a, b) for a in LAYOUTS for b in KINDS]
    cells = [
        ("top_kast", "both", "explicit"),
        ("top_kast_random", "both", "auto"),
        ("set", "fsdp", "explicit"),
        ("rigl", "tensor", "auto"),
    ]
    if full:
        cells = [(m, *pair) for m in methods() for pair in pairs]
    alone = {}
    for name, layout, kind in cells:
        tx, step = exact_step(methods()[name])
        if name not in alone:
            alone[name] = trajectory(step, None, tx)[0]
        here = place(layout, kind)
        with jax.set_mesh(here.mesh):
            spread, found = trajectory(step, here, tx)
        pairs = zip(alone[name], spread, strict=True)
        moved = not same_bits(tk.masks(spread[0][1]), tk.masks(spread[-1][1]))
        result = {"equal": [same_bits(a, b) for a, b in pairs], "moved": moved}
        report(f"{name}/{layout}/{kind}", result | found)


# Training ----------------------------------------------------------------------------


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


def suite_training(full: bool) -> None:
    """Losses of 20 steps: the sharded run against one device, from equal states."""
    cells = [("top_kast", "both", "auto"), ("rigl", "fsdp", "explicit")]
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


# Compiled programs -------------------------------------------------------------------

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


def suite_programs(full: bool) -> None:
    """What is moved between devices, beside the dense step with the same sharding."""
    adam = optax.adam(0.01)
    smallest = min(p.size for p in jax.tree.leaves(parameters()) if p.ndim > 1)
    cells = [("auto", ["top_kast", "rigl"]), ("explicit", ["top_kast_random"])]
    if full:
        cells = [(kind, list(methods())) for kind in KINDS]
    for kind, names in cells:
        here = place("both", kind)
        for name in names:
            tx = tk.sparse(adam, methods()[name], axes=tk.axes(AXES))
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


SUITES = {
    "selection": suite_selection,
    "refresh": suite_refresh,
    "training": suite_training,
    "programs": suite_programs,
}

if __name__ == "__main__":
    assert jax.device_count() == 8
    COMPILATION = fast_compilation()
    SUITES[sys.argv[1]]("full" in sys.argv[2:])
