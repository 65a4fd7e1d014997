"""GSE with packed parameters over a mesh: the draws and masks of one device, to the bit."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import sizes_in
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from setting import HIDDEN, IN, draw, jit, report, same_bits, strays, wait
from suite_packed import BATCH, EVERY, GROUPS, SPECS, moved_bytes, placed, product

import topkast_jax as tk

STEPS, ROWS, SPARSITY = 6, 16, 0.875
DENSE = IN * HIDDEN


def parameters() -> Any:
    return {"one": {"kernel": draw(0, IN, HIDDEN) / 8, "bias": draw(1, HIDDEN) / 8}}


def transformation(layout: Any, candidates: Any) -> Any:
    inner = tk.blocks(4, 4) if layout == "block" else tk.unstructured
    method = tk.gse(
        SPARSITY,
        candidates=candidates,
        subset=0.75,
        drop_fraction=0.5,
        distribution=tk.uniform,
        refresh=tk.every(EVERY),
        structure=tk.groups_of(GROUPS, inner),
    )
    # No root and no quotient that a compiler might round anew.
    return tk.sparse(optax.sgd(2.0**-5, momentum=0.5), method, layout=layout, seed=3)


def batch(t: int) -> Any:
    """Multiples of 1/8: no order of additions changes a gradient or a statistic."""
    draws = np.random.default_rng(t)
    return tuple(
        draws.integers(-8, 9, (ROWS, n)).astype(np.float32) / 8 for n in (IN, HIDDEN)
    )


def objective(alpha: Any, x: Any, y: Any) -> jax.Array:
    """Linear in the weights, so that its gradients are sums of products of the batch."""
    kernel = alpha["one"]["kernel"]
    tapped = isinstance(kernel, tk.Tapped)
    found = product(x, kernel.value if tapped else kernel)
    found = tk.observe(x, found, kernel) if tapped else found
    return jnp.sum((found + alpha["one"]["bias"]) * y)


def alone(theta: Any, opt_state: Any, x: Any, y: Any, zeros: Any = None) -> Any:
    """The loss on one device."""
    alpha = tk.sparsify(theta, tk.masks(opt_state))
    return objective(alpha if zeros is None else tk.tap(alpha, zeros), x, y)


def spread(mesh: Any, shardings: Any) -> Any:
    """The same over devices: each has its rows, and gathers the others' groups."""

    def loss(theta: Any, opt_state: Any, x: Any, y: Any, zeros: Any = None) -> Any:
        def local(theta: Any, masks: Any, x: Any, y: Any, zeros: Any) -> Any:
            whole, all_masks = tk.gather_groups(theta, masks, shardings, BATCH)
            alpha = tk.sparsify(whole, all_masks)
            alpha = alpha if zeros is None else tk.tap(alpha, zeros)
            return jax.lax.psum(objective(alpha, x, y), BATCH)

        everywhere = NamedSharding(mesh, P())
        of_state = tk.state_shardings(opt_state, theta, shardings, everywhere)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                tk.sharding_specs(shardings, BATCH),
                tk.sharding_specs(tk.masks(of_state), BATCH),
                P(BATCH),
                P(BATCH),
                P(),
            ),
            out_specs=P(),
            axis_names=set(BATCH),
            check_vma=False,
        )(theta, tk.masks(opt_state), x, y, zeros)

    return loss


def train(tx: Any, place: str | None) -> Any:
    """What was drawn and A after every step; the compiled texts; arrays that strayed."""
    theta, opt_state, store = tk.start(tx, parameters())
    loss, rows, shardings = alone, None, None
    if place is not None:
        mesh, dense = placed(place)
        dense = {"one": dense["one"]}
        of_theta = tk.packed_shardings(tk.masks(opt_state), dense)
        everywhere = NamedSharding(mesh, P())
        of_state = tk.state_shardings(opt_state, theta, of_theta, everywhere)
        shardings = (of_theta, of_state)
        theta, opt_state = jax.device_put((theta, opt_state), shardings)
        rows = NamedSharding(mesh, P(BATCH))
        loss = spread(mesh, of_theta)

    def step(theta: Any, opt_state: Any, x: Any, y: Any) -> Any:
        zeros = tk.taps(tx, theta, opt_state)
        grads, stats = jax.grad(loss, argnums=(0, 4))(theta, opt_state, x, y, zeros)
        updates, opt_state = tx.update(grads, opt_state, theta, stats=stats)
        return optax.apply_updates(theta, updates), opt_state

    compiled = jit(step, out_shardings=shardings)
    texts: dict[str, str] = {}
    seen, lost = [], []
    for t in range(STEPS):
        x, y = batch(t) if rows is None else jax.device_put(batch(t), rows)
        found = None
        if tk.due(tx, t + 1):
            if rows is not None and not texts:
                made = tk.probe_candidates.lower(loss, theta, opt_state, (x, y))
                texts["probe"] = made.compile().as_text()
                made = compiled.lower(theta, opt_state, x, y)
                texts["step"] = made.compile().as_text()
                update = jit(lambda g, s, p, z: tx.update(g, s, p, stats=z))
                zeros = tk.taps(tx, theta, opt_state)
                made = update.lower(theta, opt_state, theta, zeros)
                texts["update"] = made.compile().as_text()
            found = wait(tk.probe(loss, theta, opt_state, x, y))
        theta, opt_state = wait(compiled(theta, opt_state, x, y))
        drawn = np.asarray(tk.masks(opt_state).probe["one"]["kernel"])
        if found is not None:
            theta, opt_state, store = tk.refresh(tx, theta, opt_state, store, found)
        if shardings is not None:
            lost += strays((theta, opt_state), shardings)
        index = tk.masks(opt_state).forward["one"]["kernel"].index
        seen.append((drawn, np.asarray(index), np.asarray(theta["one"]["kernel"])))
    return seen, texts, lost


def run(full: bool) -> None:
    """Two cells, or every layout, place and way to draw."""
    cells = [("packed", "fsdp", "grabo"), ("block", "fsdp", "uniform")]
    if full:
        cells = [
            (layout, place, candidates)
            for layout in ("packed", "block")
            for place in SPECS
            for candidates in ("uniform", "grabo")
        ]
    for layout, place, candidates in cells:
        tx = transformation(layout, candidates)
        one, *_ = train(tx, None)
        eight, texts, lost = train(tx, place)
        report(
            f"{layout}/{place}/{candidates}",
            {
                "equal": [same_bits(*pair) for pair in zip(one, eight, strict=True)],
                "drawn": [bool((drawn >= 0).all()) for drawn, *_ in one],
                "moved": [
                    len(np.setdiff1d(b[1], a[1])) > 0
                    for a, b in itertools.pairwise(one)
                ],
                "lost": lost,
                "largest": {
                    name: max(sizes_in(text)) / DENSE for name, text in texts.items()
                },
                "bytes": {
                    name: moved_bytes(text) / (4 * DENSE)
                    for name, text in texts.items()
                },
            },
        )
