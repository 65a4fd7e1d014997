"""The largest network that fits: budgets, the search, and the training itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from benchmarks import ahead, decoder, fit, largest, mixed, tpu
from experiments import budget


def setting(**changed: Any) -> largest.Setting:
    found = largest.Setting(
        layers=2,
        width=32,
        sparsities=(0.75, 0.5),
        layout="block",
        side=8,
        theta=jnp.dtype("float32"),
        dtype=jnp.dtype("float32"),
        rows=1,
        segment=8,
        every=2,
        rate=1e-3,
    )
    return found._replace(**changed)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_tiny_network_trains(
    packed: bool, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """It raises where the loss does not fall."""
    flags = ["--layout=packed", "--theta=bfloat16", f"--reservoir={tmp_path}"]
    largest.main(["--quick", *(flags if packed else [])])
    out = capsys.readouterr().out
    assert "host: theta" in out and "a refresh " in out and "nan" not in out
    mapped = sum(f.stat().st_size for f in tmp_path.glob("*.bin"))
    assert mapped == (2 * 12 * 128**2 * 2 if packed else 0)


def test_too_little_memory_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "room", lambda files: budget.Room(10**6, 10**9, None))
    monkeypatch.setattr(tk, "start", lambda *a, **k: pytest.fail("was started"))
    with pytest.raises(SystemExit):
        largest.main(["--quick"])
    assert "device memory: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (budget.Room(None, 79, None), "memory, device and host in one"),
        (budget.Room(100, 29, None), "host memory"),
        (budget.Room(100, 19, 100), "host memory"),
        (budget.Room(100, 100, 9), "files"),
        (budget.Room(49, 100, None), "device memory"),
        (budget.Room(50, 100, None, disk=29), "disk"),
        (budget.Room(50, 100, 10, disk=39), "disk"),
        (budget.Room(50, 100, 10, disk=40), None),
        (budget.Room(50, 100, None, disk=30), None),
        (budget.Room(None, 80, None), None),
        (budget.Room(50, 20, 10), None),
    ],
)
def test_what_does_not_fit_is_named(there: budget.Room, named: str | None) -> None:
    need = budget.Budget(1, 1, 1, step=50, refresh=50, theta=10, work=20, disk=30)
    if named is None:
        budget.require(need, there)
        return
    with pytest.raises(ValueError, match=named):
        budget.require(need, there)


@pytest.mark.parametrize("changed", [{}, {"layout": "packed", "theta": jnp.bfloat16}])
def test_the_budget_is_what_is_made(changed: dict[str, Any]) -> None:
    chosen = setting(**changed)
    tx = largest.transformation(chosen)
    need = largest.budget(chosen, 0)
    theta, opt_state, store = tk.start(tx, lambda: largest.initial(chosen))
    assert need.theta == store.nbytes
    assert need.parameters == budget.size_of(theta)
    assert need.positions + need.moments == budget.size_of(opt_state)


def test_flags_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--layers=0", "--width=200", "--steps=20", "--sparsities=98"):
        with pytest.raises(SystemExit):
            largest.main([flag])
        assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_search_finds_what_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(largest, "planned", lambda program: program)
    monkeypatch.setattr(largest, "compile_step", lambda s, tx: 10 + 7 * s.layers)
    each = largest.budget(setting(layers=2), 0).theta // 2
    there = budget.Room(device=10**12, host=10**12, files=5 * each + 1)
    assert largest.search(setting(), there).layers == 5
    there = budget.Room(device=10**12, host=10**12, files=each - 1)
    with pytest.raises(ValueError, match="not even one layer"):
        largest.search(setting(), there)


@pytest.mark.parametrize("most", [0, 1, 7, 24, 240, 999])
@pytest.mark.parametrize("off", [0.3, 0.97, 1.0, 1.04, 1.5])
@pytest.mark.parametrize("base", [0, 0.5])
def test_the_largest_from_above(most: int, off: float, base: float) -> None:
    tried: list[int] = []

    def share(layers: int) -> float | None:
        tried.append(layers)
        used = base + (1 - base) * layers / max(most, 1)
        return used if layers <= most else None

    found = fit.largest(round(off * most) + 1, share)
    assert found <= most < found + fit.step(most + 1)
    fitting = [n for n in tried if n <= most]
    if off >= 1 and most:
        assert fitting == [found]  # one expensive trial
    assert len(fitting) <= (2 if base == 0 else 9)
    if found:
        assert any(found < n <= found + fit.step(n) for n in tried)  # the proof


def test_small_updates_of_rounded_weights_add_up() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = mixed.in_float32(optax.sgd(1.0))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update({"w": jnp.full(3, -1e-3)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.master_weights["w"], 1.004, rtol=1e-6)
    assert params["w"].dtype == jnp.bfloat16
    assert params["w"].tolist() == [1.0078125] * 3  # the nearest of 1 and 1 + 2^-7
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)


def test_a_refresh_moves_float32_weights_with_their_entries() -> None:
    method = tk.top_kast(0.5, 0.5, refresh=tk.every(1), penalty=0.0)
    tx = tk.sparse(mixed.in_float32(optax.sgd(1.0)), method, layout="packed")
    kernel = jnp.asarray([[1.0, 2.0], [3.0, 4.0]], jnp.bfloat16)
    theta, state, store = tk.start(tx, {"kernel": kernel})
    assert theta["kernel"].tolist() == [3, 4]
    grads = {"kernel": jnp.asarray([1.9, 1e-3], jnp.bfloat16)}  # 3 falls below 2
    updates, state = tx.update(grads, state, theta)
    theta = optax.apply_updates(theta, updates)
    theta, state, store = tk.refresh(tx, theta, state, store)
    assert theta["kernel"].tolist() == [2, 4]
    assert theta["kernel"].dtype == store.theta["kernel"].dtype == jnp.bfloat16
    master = state.sparse_inner.master_weights["kernel"]
    assert master.dtype == jnp.float32
    assert master[0] == 2 and 3.998 < master[1] < 4


@pytest.mark.parametrize(
    ("message", "needed", "room"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(105.47G) exceeds available HBM (95.73G). HLO module: jit_step.",
            105.47,
            95.73,
        ),
        (
            "Ran out of memory in memory space hbm. Used 1.5T of 15.75G hbm. Exceeded "
            "hbm capacity by 1.48T.",
            1536,
            15.75,
        ),
    ],
)
def test_a_refusal_is_read(message: str, needed: float, room: float) -> None:
    found = ahead.said(message)
    assert (found.needed / 2**30, found.room / 2**30) == pytest.approx((needed, room))


def test_a_refusal_that_says_nothing() -> None:
    with pytest.raises(ValueError, match="without sizes"):
        ahead.said("no")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(tpu.WAYS[0], marks=pytest.mark.slow),
        tpu.WAYS[1],
        pytest.param(tpu.WAYS[3], marks=pytest.mark.slow),
    ],
    ids=lambda way: way.title,
)
def test_a_step_compiles_for_the_devices_that_are_here(way: ahead.Way) -> None:
    found = ahead.compile_step(ahead.Chip("here", "", 1, 32), way, 2, jax.devices())
    sparse, dense = 2 * 12 * 32**2, 256 * 32
    assert found.weights == sparse + dense
    kept = 1 if way.layout is None else 1 - way.backward
    assert found.bytes > 12 * (kept * sparse + dense)


def test_bytes_of_collectives() -> None:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def local(x: jax.Array) -> jax.Array:
        def turn(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(carry, "d", tiled=True)
            return jax.lax.psum_scatter(whole, "d", tiled=True), None

        return jax.lax.psum(jax.lax.scan(turn, x, length=3)[0], "d")

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P(),
        check_vma=False,
    )
    x = jnp.ones((4, 8))
    assert ahead.moved(jax.make_jaxpr(mapped)(x).jaxpr) == (3 * 2 + 1) * 4 * 8 * 4


def test_layers_in_either_form_give_the_same() -> None:
    key = jax.random.key(0)
    kernels = jax.tree.map(
        lambda s: jax.random.normal(key, s.shape) / s.shape[0] ** 0.5,
        decoder.layer_shapes(16),
    )
    tx = tk.sparse(
        optax.sgd(1.0), tk.static(0.5, structure=tk.blocks(8, 8)), layout="block"
    )
    theta, state, _ = tk.start(tx, kernels)
    x = jax.random.normal(jax.random.key(1), (2, 4, 16))
    found = decoder.layer(tk.sparsify(theta, tk.masks(state)), x, "blocks")
    expected = decoder.layer(tk.export(theta, state), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
