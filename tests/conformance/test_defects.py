"""What breaks another library of masks in JAX, held against every method of this one.

`GUARDS` says for each of its defects which test notices it here, and over which methods
in the default suite. Most are noticed where a program is traced, which is quick enough
for every method with every optimizer; running that product is slow.
"""

import ast
import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import battery
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import test_methods_by_optimizers as product
import test_trees as trees
from battery import EVERY, FACTS, METHODS

import topkast_jax as tk

TESTS = pathlib.Path(__file__).parents[1]
HERE = "conformance/test_defects.py"
CELLS = "conformance/test_methods_by_optimizers.py"


class Guard(NamedTuple):
    """One defect.

    Attributes:
      what: what happens there.
      over: methods of the default suite that are held against it.
      tests: that notice it, file and function.
    """

    what: str
    over: str
    tests: tuple[tuple[str, str], ...]


GUARDS: dict[str, Guard] = {
    "biases": Guard(
        "set and rigl fail on a model that has a bias, whose mask is None",
        "all run",
        ((CELLS, "test_cell"),),
    ),
    "optimizers": Guard(
        "adafactor, lion, rmsprop, inject_hyperparams, MultiSteps, ema and "
        "multi_transform are no optimizer states that rigl knows",
        "all are traced with every one; top_kast runs with every one, gse and dsr with "
        "one of them",
        (
            (HERE, "test_any_optimizer_keeps_the_type_of_its_state"),
            (CELLS, "test_cell"),
        ),
    ),
    "bits": Guard(
        "masks packed to bits fail for static, set and rigl",
        "newer ones, static, set and rigl saved as bits; all start in the packed layout "
        "or are refused by name",
        (
            (HERE, "test_masks_go_to_bits_and_back"),
            (HERE, "test_packed_arrays_or_a_refusal"),
            (
                "layouts/test_packed.py",
                "test_masks_and_weights_are_those_of_the_masked_layout",
            ),
        ),
    ),
    "hooks": Guard(
        "whoever forgets a hook after the update trains a dense network, unnoticed",
        "all land on their mask by the update alone; a dense gradient is counted by "
        "newer ones, static, set and rigl",
        ((CELLS, "test_cell"), (HERE, "test_a_dense_gradient_is_noticed")),
    ),
    "enclosed": Guard(
        "inside optax.chain or MultiSteps the masks are not found",
        "all traced; dsr runs inside MultiSteps",
        (
            (HERE, "test_any_optimizer_keeps_the_type_of_its_state"),
            (CELLS, "test_cell"),
        ),
    ),
    "stacks": Guard(
        "of four stacked layers one dies, since they are one selection",
        "all run",
        (("conformance/test_trees.py", "test_stacked_kernels_keep_k_in_each_slice"),),
    ),
    "gathers": Guard(
        "a selection gathers a sharded weight whole, several times",
        "top_kast, rigl, snfs, gse, deep_r compiled for eight devices",
        (
            (
                "sharding/test_compiled_programs.py",
                "test_no_weight_is_gathered_that_dense_training_leaves",
            ),
        ),
    ),
    "sorts": Guard(
        "a selection is an argsort, 24 times as long as counting",
        "all lowered: nothing as large as a kernel is sorted",
        ((HERE, "test_no_weight_is_sorted"),),
    ),
    "counts": Guard(
        "past 2^24 a number kept in float32 is off by one",
        "what all methods count with",
        (
            ("test_select.py", "test_k_beyond_float32"),
            ("test_pruning.py", "test_counts_are_exact_beyond_what_float32_knows"),
            (HERE, "test_counts_of_every_method_are_integers"),
        ),
    ),
    "ties": Guard(
        "where gradients tie, all growth lands in the first rows",
        "all that grow by gradient run",
        (
            (
                "test_oracles_dynamic.py",
                "test_growth_where_nothing_has_a_gradient_is_spread",
            ),
        ),
    ),
    "trees": Guard(
        "NNX states and tuples fail, which are no dicts",
        "newer ones traced, gse runs on an NNX state; top_kast and rigl run on every tree",
        (
            (HERE, "test_any_tree_keeps_its_type"),
            ("conformance/test_trees.py", "test_tree"),
        ),
    ),
    "schedules": Guard(
        "a schedule that never fires is silently static, and a share to drop that "
        "changes is wired to two methods",
        "all that have a schedule, all that drop a share",
        (
            ("test_schedule.py", "test_what_cannot_be_is_refused"),
            ("experiments/test_config.py", "test_a_method_that_never_fires_is_refused"),
            (HERE, "test_a_share_to_drop_may_be_a_schedule"),
        ),
    ),
    "named tuples": Guard(
        "a walk over the optimizer's state makes plain tuples of its named ones",
        "all traced; what runs asserts it too",
        ((HERE, "test_any_optimizer_keeps_the_type_of_its_state"),),
    ),
}


@pytest.mark.parametrize("name", GUARDS)
def test_every_guard_is_there(name: str) -> None:
    for file, function in GUARDS[name].tests:
        body = ast.parse((TESTS / file).read_text()).body
        found = [f for f in body if getattr(f, "name", None) == function]
        assert found, (file, function)
        slow = [ast.unparse(d) for f in found for d in f.decorator_list]
        assert "pytest.mark.slow" not in slow, (file, function)


def traced(tx: optax.GradientTransformation, model: battery.Model) -> Any:
    """The shapes of a state before and after an update, and of the updates."""

    def step(state: Any) -> Any:
        alpha = tk.sparsify(model.params, tk.masks(state))
        grads = jax.tree.map(jnp.ones_like, alpha)
        return tx.update(grads, state, model.params)

    state = jax.eval_shape(tx.init, model.params)
    return state, *jax.eval_shape(step, state)[::-1]


def assert_same_type(tx: optax.GradientTransformation, model: battery.Model) -> None:
    """An update gives back what it was given, named tuples and all."""
    before, after, updates = traced(tx, model)
    assert battery.description(after) == battery.description(before)
    assert battery.description(updates) == battery.description(model.params)
    masks = tk.masks(after)
    sparse = jax.tree.leaves(masks.forward)
    assert sparse and all(mask.dtype == jnp.bool_ for mask in sparse)


def one_kernel() -> battery.Model:
    params = {"one": battery.plain_dict().params["one"]}
    return battery.Model(params, lambda p, x: x @ p["one"]["kernel"])


@contextlib.contextmanager
def unchecked_types() -> Iterator[None]:
    """Without the checks of annotations, half of what tracing takes; cells make them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("method", tk.METHODS)
def test_any_optimizer_keeps_the_type_of_its_state(method: str) -> None:
    made = battery.make_method(method)
    for name, build in product.OPTIMIZERS.items():
        # Labels by layer need two of them.
        several = name.startswith("multi_transform")
        model = battery.plain_dict() if several else one_kernel()
        try:
            with unchecked_types():
                assert_same_type(build(made), model)
        except Exception as error:
            raise AssertionError(f"{method} with {name}") from error


@pytest.mark.parametrize("method", product.DYNAMIC)
def test_any_tree_keeps_its_type(method: str) -> None:
    for name in ("nnx_state", "tuples", "registered_dataclass"):
        model = trees.TREES[name]()
        made = battery.make_method(method, model.where)
        tx = tk.sparse(optax.adam(0.05), made, learning_rate=battery.RATE)
        try:
            assert_same_type(tx, model)
        except Exception as error:
            raise AssertionError(f"{method} on {name}") from error


def begun(method: str) -> tuple[optax.GradientTransformation, Any, Any]:
    """A transformation, its parameters and its first state; no program is compiled."""
    params = {"kernel": jnp.asarray(battery.kernel(8, 12)), "bias": jnp.zeros(12)}
    tx = tk.sparse(
        optax.sgd(0.1), battery.make_method(method), learning_rate=battery.RATE
    )
    return tx, params, tx.init(params)


@pytest.mark.parametrize("method", ["static", "set", "rigl", *product.DYNAMIC])
def test_masks_go_to_bits_and_back(method: str, tmp_path: pathlib.Path) -> None:
    _, params, state = begun(method)
    masks = tk.dense_masks(state).forward
    tk.save_masks(tmp_path / "masks.npz", masks)
    found = tk.load_masks(tmp_path / "masks.npz")
    assert list(found) == ["kernel"]
    np.testing.assert_array_equal(found["kernel"], masks["kernel"])
    assert found["kernel"].shape == params["kernel"].shape


@pytest.mark.parametrize("method", METHODS)
def test_packed_arrays_or_a_refusal(method: str) -> None:
    """B alone is stored; where the sizes of sets change, it is said before training."""
    made = battery.make_method(method)
    if method == "srigl":  # of constant fan-in, which it keeps without ablation
        made = tk.srigl(battery.FORWARD, gamma_sal=0.0, refresh=tk.every(EVERY))
    options: Any = dict(layout="packed", learning_rate=battery.RATE)
    if not made.fixed:
        with pytest.raises(ValueError, match=f"{made.name} changes how many entries"):
            tk.sparse(optax.sgd(0.1), made, **options)
        return
    tx = tk.sparse(optax.sgd(0.1), made, **options)
    theta, state = tk.shapes(tx, {"kernel": jnp.ones((16, 16))})
    _, k_b = FACTS[method].counts(256, 0)
    assert theta["kernel"].shape == (k_b,)
    assert tk.masks(state).forward["kernel"].index.shape == (k_b,)


SEES_ALL = ("acdc", "snfs")
"""Their first step may see every gradient: B, or P, is everything."""


@pytest.mark.parametrize("method", ["static", "set", "rigl", *product.DYNAMIC])
def test_a_dense_gradient_is_noticed(method: str) -> None:
    """The loss saw theta, not alpha: counted, and refused by `tk.check`."""
    tx, params, state = begun(method)
    grads = jax.tree.map(jnp.ones_like, params)
    _, after = tx.update(grads, state, params)
    leaked = int(tk.health(after).leaks)
    assert leaked == (method not in SEES_ALL)
    if leaked:
        with pytest.raises(ValueError, match="sparsify"):
            tk.check(tk.export(params, after), after)


SORTS = re.compile(
    r"(?:stablehlo\.sort\b.*?\}\) : \(|chlo\.top_k[^:]*: )tensor<([\dx]*)x", re.DOTALL
)


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_is_sorted(method: str) -> None:
    params = one_kernel().params
    tx = tk.sparse(
        optax.sgd(0.1), battery.make_method(method), learning_rate=battery.RATE
    )
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, state, params).as_text()
    sizes = [
        int(np.prod([int(n) for n in dims.split("x")])) for dims in SORTS.findall(text)
    ]
    assert max(sizes, default=0) <= battery.HIDDEN, sizes


def test_a_sort_would_be_seen() -> None:
    x = jnp.ones((16, 5))
    sorts = jax.jit(lambda x: jnp.argsort(x, axis=None)).lower(x)
    assert SORTS.findall(sorts.as_text()) == ["80"]
    assert SORTS.findall(jax.jit(lambda x: jax.lax.top_k(x, 2)).lower(x).as_text())


@pytest.mark.parametrize("method", METHODS)
def test_counts_of_every_method_are_integers(method: str) -> None:
    """Of a parameter with more entries than float32 can count."""
    shape = (7_000, 7_143)  # 50,001,000 entries, 12,500,250 of which are kept
    made = METHODS[method](refresh=tk.every(EVERY))
    counts = made.counts({"kernel": shape}, {"kernel": 1})["kernel"]
    size = shape[0] * shape[1]
    for k in counts:
        assert type(k) is int and 0 <= k <= size
    wanted = {k for step in (0, 10) for k in FACTS[method].counts(size, step)}
    assert set(counts) <= wanted


DROPS = ("set", "rigl", "rigl_itop", "granet", "snfs", "mest", "srigl", "dsr", "gse")


def test_every_share_to_drop_is_listed() -> None:
    import inspect

    makers = {name: getattr(tk, name) for name in tk.METHODS if name != "set"}
    makers["set"] = tk.set_
    takes = [
        name
        for name, make in makers.items()
        if "drop_fraction" in inspect.signature(make).parameters
    ]
    assert set(takes) == set(DROPS)


@pytest.mark.parametrize("method", DROPS)
def test_a_share_to_drop_may_be_a_schedule(method: str) -> None:
    """It is asked with the step that the masks are for, wherever it is traced."""
    asked = []

    def share(step: Any) -> Any:
        asked.append(step)
        return jnp.where(step < 4, 0.3, 0.0)

    make = tk.set_ if method == "set" else getattr(tk, method)
    options: dict[str, Any] = {"drop_fraction": share}
    if method == "granet":
        options |= battery.RAMP
    else:
        options["refresh"] = tk.every(EVERY)
    tx = tk.sparse(optax.sgd(0.1), make(0.75, **options))
    before, after, _ = traced(tx, battery.plain_dict())
    assert battery.description(after) == battery.description(before)
    assert any(isinstance(step, jax.core.Tracer) for step in asked)
