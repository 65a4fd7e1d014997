"""The oracle against examples worked by hand; all numbers are in the comments."""

import numpy as np
import pytest
from oracle import Oracle, adam, adamw, erdos_renyi, every, sgd, top_k, uniform


def mask_of(indices, shape):
    mask = np.zeros(shape, bool)
    mask.flat[list(indices)] = True
    return mask


def on(mask):
    return set(np.flatnonzero(mask).tolist())


def test_top_k_is_exact_and_breaks_ties_by_index():
    # Linear indices 0..7; the value 3 stands at 1, 2 and 4.
    scores = np.array([[1.0, 3.0, 3.0, -np.inf], [3.0, -2.0, np.nan, 2.0]])
    assert on(top_k(scores, 0)) == set()
    assert on(top_k(scores, 2)) == {1, 2}
    assert on(top_k(scores, 4)) == {1, 2, 4, 7}
    assert on(top_k(scores, 7)) == {0, 1, 2, 3, 4, 5, 7}  # NaN after -inf.
    assert on(top_k(scores, 2, among=scores != 1.0)) == {1, 2}
    assert on(top_k(scores, 2, among=~mask_of([1], (2, 4)))) == {2, 4}
    backwards = 7 - np.arange(8).reshape(2, 4)
    assert on(top_k(scores, 2, ranks=backwards)) == {2, 4}
    assert on(top_k(scores, 5, ranks=backwards)) == {0, 1, 2, 4, 7}
    assert on(top_k(np.array([-0.0, 0.0, 0.0]), 1)) == {0}  # -0 ties with 0.
    with pytest.raises(ValueError, match="k=3 of 2"):
        top_k(scores, 3, among=mask_of([0, 1], (2, 4)))


def test_counts():
    # 16/2, 15/2 = 7.5 to the even 8, 5/2 = 2.5 to the even 2.
    shapes = {"a": (4, 4), "b": (3, 5), "c": (1, 5)}
    assert uniform(shapes, 0.5) == {"a": 8, "b": 8, "c": 2}
    # Budget 36/2 = 18. Sums of shapes 4 and 12: epsilon 18/16, a at density 9/8 > 1,
    # so a is dense (4) and b takes the other 14.
    cap = {"a": (2, 2), "b": (4, 8)}
    assert erdos_renyi(cap, 0.5, kernel=True) == {"a": 4, "b": 14}
    assert erdos_renyi(cap, 0.0, kernel=True) == {"a": 4, "b": 32}
    # Budget round(.28 * 33 = 9.24) = 9, epsilon 9/20: 2.7, 2.7, 3.6 -> 2, 2, 3 and the
    # two missing go to the remainders .7, .7.
    rest = {"a": (3, 3), "b": (2, 4), "c": (4, 4)}
    assert erdos_renyi(rest, 0.72, kernel=True) == {"a": 3, "b": 3, "c": 3}
    # Budget round(.4 * 108 = 43.2) = 43. Over the last two axes the shares are
    # 72 * 6/8 = 54 and 12: 35.18 and 7.82. With the kernel 12 and 12: 21.5 each.
    conv = {"conv": (3, 3, 2, 4), "dense": (6, 6)}
    assert erdos_renyi(conv, 0.6) == {"conv": 35, "dense": 8}
    assert erdos_renyi(conv, 0.6, kernel=True) == {"conv": 22, "dense": 21}


def test_clock():
    def fires(due):
        return [step for step in range(11) if due(step)]

    assert fires(every(3)) == [3, 6, 9]
    assert fires(every(2, start=5, stop=9)) == [5, 7]
    assert fires(every(4, start=0)) == [4, 8]
    run = Oracle(
        {"w": np.ones(2)}, "top_kast", sgd(1.0), forward={"w": 1}, due=every(2), stop=5
    )
    assert fires(run.refreshes) == [2, 4, 5]


def test_top_kast_penalty_and_refresh_from_the_reservoir():
    run = Oracle(
        {"w": np.array([[4.0, -3.0], [2.0, 1.0]])},
        "top_kast",
        sgd(0.5),
        forward={"w": 2},
        backward={"w": 3},
        due=every(1),
        penalty=0.5,
    )
    leaf = run.leaves["w"]
    assert (on(leaf.forward), on(leaf.backward)) == ({0, 1}, {0, 1, 2})
    assert run.alpha()["w"].tolist() == [[4.0, -3.0], [0.0, 0.0]]
    # D = 2/4. Penalty gradient: .5*4 = 2, .5*-3 = -1.5 on A; .5*2/.5 = 2 on B less A.
    # Gradient 1 everywhere: 3, -.5, 3 on B; times -.5: -1.5, +.25, -1.5.
    assert run.step({"w": np.ones((2, 2))})["w"].tolist() == [[2.5, -2.75], [0.5, 1.0]]
    # The reservoir's 1 now beats .5 and enters B.
    assert (on(leaf.forward), on(leaf.backward)) == ({0, 1}, {0, 1, 3})
    # Gradient 0: decay by .25 * theta on A, by .5 * theta on B less A: 1 -> .5.
    assert run.step({"w": np.zeros((2, 2))})["w"].tolist() == [
        [1.875, -2.0625],
        [0.5, 0.5],
    ]
    # .5 against .5: the lowest index.
    assert on(leaf.backward) == {0, 1, 2}
    assert not run.probe


@pytest.mark.parametrize("reset, left", [("init", 0.0), ("keep", -4.0)])
def test_decoupled_l1_penalty_and_moments(reset, left):
    run = Oracle(
        {"w": np.array([4.0, -2.0, 1.0, 0.0])},
        "top_kast",
        sgd(0.5, momentum=0.5),
        forward={"w": 1},
        backward={"w": 2},
        due=every(2),
        penalty=0.25,
        penalty_norm="l1",
        penalty_mode="decoupled",
        learning_rate=lambda step: 0.5,
        reset=reset,
    )
    leaf = run.leaves["w"]
    # D = 1/4. Decay .5 * (.25, -.25/.25) = .125, -.5 every step, outside the trace.
    # Trace 1, 2: 4 - .5 - .125 and -2 - 1 + .5.
    theta = run.step({"w": np.array([1.0, 2.0, 5.0, 5.0])})["w"]
    assert theta.tolist() == [3.375, -2.5, 1.0, 0.0]
    assert leaf.moments["trace"].tolist() == [1.0, 2.0, 0.0, 0.0]
    # Trace .5, .5*2 - 5 = -4: 3.375 - .25 - .125 and -2.5 + 2 + .5.
    theta = run.step({"w": np.array([0.0, -5.0, 5.0, 5.0])})["w"]
    assert theta.tolist() == [3.0, 0.0, 1.0, 0.0]
    # Entry 2 replaces entry 1 in B; entry 0 stays and keeps its trace.
    assert on(leaf.backward) == {0, 2}
    assert leaf.moments["trace"].tolist() == [0.5, left, 0.0, 0.0]
    # Entry 0: trace .25, 3 - .125 - .125. Entry 2: 1 - .5 * .25/.25. Entry 1 rests at 0
    # whatever its trace holds.
    theta = run.step({"w": np.zeros(4)})["w"]
    assert theta.tolist() == [2.75, 0.0, 0.5, 0.0]


def test_random_exploration_and_stop():
    draws = []

    def draw(step, path, k, allowed):
        draws.append((step, path, k, on(allowed)))
        return mask_of([3 - step], 4)

    run = Oracle(
        {"w": np.array([4.0, 3.0, 2.0, 1.0])},
        "top_kast",
        sgd(1.0),
        forward={"w": 1},
        backward={"w": 2},
        due=every(1),
        penalty=0.0,
        explore="random",
        stop=2,
        draw=draw,
    )
    leaf = run.leaves["w"]
    assert (on(leaf.forward), on(leaf.backward)) == ({0}, {0, 3})
    theta = run.step({"w": np.array([1.0, 9.0, 9.0, 1.0])})["w"]
    assert theta.tolist() == [3.0, 3.0, 2.0, 0.0]
    assert (on(leaf.forward), on(leaf.backward)) == ({0}, {0, 2})
    theta = run.step({"w": np.array([1.0, 9.0, 1.0, 9.0])})["w"]
    assert theta.tolist() == [2.0, 3.0, 1.0, 0.0]
    # Step 2 is the last selection: A moves to entry 1, then B := A, nothing drawn.
    assert (on(leaf.forward), on(leaf.backward)) == ({1}, {1})
    theta = run.step({"w": np.array([9.0, 2.0, 9.0, 9.0])})["w"]
    assert theta.tolist() == [2.0, 1.0, 1.0, 0.0]
    assert on(leaf.forward) == {1}  # Fixed, although 2 > 1 now.
    assert draws == [(0, "w", 1, {1, 2, 3}), (1, "w", 1, {1, 2, 3})]


def test_adam_counts_globally_and_decay_spares_the_reservoir():
    options = {"forward": {"w": 1}, "penalty": 0.0, "due": every(1)}
    run = Oracle({"w": np.array([1.0, 0.95])}, "top_kast", adam(0.1), **options)
    # First step: mu_hat / sqrt(nu_hat) = 2 / 2, so 1 - .1 = .9 and A moves to .95.
    theta = run.step({"w": np.full(2, 2.0)})["w"]
    np.testing.assert_allclose(theta, [0.9, 0.95], rtol=1e-6)
    assert run.leaves["w"].moments["nu"].tolist() == [0.0, 0.0]
    # The newcomer starts from zero moments under count 2:
    # (.2/.19) / sqrt(.004/.001999) = 1.0526316 / 1.4145673 = .7441368.
    theta = run.step({"w": np.full(2, 2.0)})["w"]
    np.testing.assert_allclose(theta, [0.9, 0.95 - 0.07441368], rtol=1e-5)
    # A dense leaf instead, gradient 2 then 0:
    # (.18/.19) / sqrt(.003996/.001999) = .9473684 / 1.4138598 = .6700582.
    run = Oracle({"b": np.ones(1)}, "top_kast", adam(0.1), forward={}, dtype=np.float64)
    run.step({"b": np.full(1, 2.0)})
    theta = run.step({"b": np.zeros(1)})["b"]
    np.testing.assert_allclose(theta, [0.9 - 0.06700582], rtol=1e-7)
    # Decoupled decay .5: 2 - .1 * (1 + .5 * 2) = 1.8; the reservoir's 1 does not decay.
    run = Oracle({"w": np.array([2.0, 1.0])}, "top_kast", adamw(0.1, 0.5), **options)
    theta = run.step({"w": np.full(2, 2.0)})["w"]
    np.testing.assert_allclose(theta, [1.8, 1.0], rtol=1e-6)
    assert theta[1] == 1.0


def test_static_lands_on_the_mask_and_leaves_dense_leaves_alone():
    run = Oracle(
        {"w": np.array([1.0, 2.0]), "b": np.array([1.0, 2.0])},
        "static",
        sgd(1.0),
        forward={"w": 1},
        initial=lambda path, k: mask_of([1], 2),
        due=every(1),
    )
    theta = run.step({"w": np.ones(2), "b": np.ones(2)})
    assert theta["w"].tolist() == [0.0, 1.0]
    assert theta["b"].tolist() == [0.0, 1.0]
    theta = run.step({"w": np.ones(2), "b": np.ones(2)})
    assert theta["w"].tolist() == [0.0, 0.0]
    assert theta["b"].tolist() == [-1.0, 0.0]
    assert on(run.leaves["w"].forward) == {1}


def test_set_keeps_the_value_of_an_entry_dropped_and_regrown():
    def draw(step, path, k, allowed):
        assert (step, k, on(allowed)) == (2, 2, {2, 3, 4, 5})
        return mask_of([2, 4], (2, 3))

    run = Oracle(
        {"w": np.array([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])},
        "set",
        sgd(1.0, momentum=0.5),
        forward={"w": 4},
        initial=lambda path, k: mask_of([0, 1, 2, 5], (2, 3)),
        draw=draw,
        due=every(2),
        # Read at the refresh step: 4 * .625 = 2.5, rounded to the even 2.
        drop_fraction=lambda step: 0.625 if step == 2 else 0.0,
    )
    leaf = run.leaves["w"]
    theta = run.step({"w": np.ones((2, 3))})["w"]
    assert theta.tolist() == [[5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]
    # Trace 0, 0, 5, -, -, 2: weights 5, 4, -2, 0, 0, -2. Kept: 5 and 4.
    theta = run.step({"w": np.array([[-0.5, -0.5, 4.5], [7.0, 7.0, 1.5]])})["w"]
    assert on(leaf.forward) == on(leaf.backward) == {0, 1, 2, 4}
    assert theta.tolist() == [[5.0, 4.0, -2.0], [0.0, 0.0, 0.0]]
    assert leaf.moments["trace"].tolist() == [[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
    theta = run.step({"w": np.zeros((2, 3))})["w"]
    assert theta.tolist() == [[5.0, 4.0, -4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "gradient, active, theta",
    [
        # |g| ties at 2 and 3, and `order` prefers 3; entry 1 is dropped.
        ([0.0, 0.5, -2.0, 2.0, 1.0, 0.0], {0, 3, 5}, [3.0, 0.0, 0.0, 0.0, 0.0, 7.0]),
        # The dropped entry 1 has the largest gradient: it grows back, value kept.
        ([0.0, 0.5, 0.25, 0.0, 0.0, 0.0], {0, 1, 5}, [3.0, 0.5, 0.0, 0.0, 0.0, 7.0]),
    ],
)
def test_rigl_grows_by_the_gradient_of_the_probed_step(gradient, active, theta):
    run = Oracle(
        {"w": np.array([3.0, 1.0, 7.0, 7.0, 7.0, 7.0])},
        "rigl",
        sgd(1.0),
        forward={"w": 3},
        initial=lambda path, k: mask_of([0, 1, 5], 6),
        order=lambda step, path: np.array([5, 4, 3, 0, 1, 2]),
        due=every(2),
        drop_fraction=1 / 3,
    )
    leaf = run.leaves["w"]
    assert not run.probe
    # A large gradient off B in a step without refresh has no effect, now or later.
    first = run.step({"w": np.array([0.0, 0.0, 0.0, 0.0, 9.0, 0.0])})["w"]
    assert first.tolist() == [3.0, 1.0, 0.0, 0.0, 0.0, 7.0]
    assert run.probe
    # On B: 3, 1 - .5, 7. One of three is dropped: entry 1.
    assert run.step({"w": np.array(gradient)})["w"].tolist() == theta
    assert on(leaf.forward) == on(leaf.backward) == active
    assert not run.probe
