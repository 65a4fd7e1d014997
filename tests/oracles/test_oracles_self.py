"""GSE and the shared parts against examples worked by hand."""

import numpy as np
import pytest
from oracle import every, sgd

from oracles import gse
from oracles.loop import Run, apportion, ceil_count, global_top_k, train
from oracles.marks import mask_of, on


# Shared parts
def test_apportion_is_exact_and_fills_others_when_one_is_full():
    plenty = {"a": 9, "b": 9, "c": 9}
    # 3, 1, 1, but a holds 2: the one left is .5 for b and .5 for c, b is named first.
    weights = {"a": 3, "b": 1, "c": 1}
    assert apportion(5, weights, plenty | {"a": 2}) == {"a": 2, "b": 2, "c": 1}
    # 2/3 each: rounded down to nothing, the two go to the first two.
    equal = dict.fromkeys("abc", 1.0)
    assert apportion(2, equal, plenty) == {"a": 1, "b": 1, "c": 0}
    # No weight anywhere: equal shares 1.5, 1.5.
    assert apportion(3, {"a": 0, "b": 0}, {"a": 3, "b": 3}) == {"a": 2, "b": 1}
    # 3 : 1 of 4 is 3, 1; a full a leaves all to b, whose own weight is zero.
    assert apportion(4, {"a": 1, "b": 0}, {"a": 1, "b": 5}) == {"a": 1, "b": 3}
    with pytest.raises(ValueError, match="5 entries, room for 4"):
        apportion(5, {"a": 1, "b": 1}, {"a": 2, "b": 2})


def test_ceil_count_forgives_rounding():
    assert 0.07 * 100 > 7
    assert [ceil_count(r, n) for r, n in ((0.07, 100), (0.2, 11), (0.0, 5))] == [
        7,
        3,
        0,
    ]
    assert ceil_count(float(np.float32(0.3)), 10) == 3  # .3000000119 * 10


def test_global_ties_go_to_the_leaf_named_first():
    scores = {"b": np.array([[1.0, 3.0]]), "a": np.array([[3.0, 2.0]])}
    chosen = global_top_k(scores, 1)
    assert (on(chosen["b"]), on(chosen["a"])) == ({1}, set())
    chosen = global_top_k(scores, 3)
    assert (on(chosen["b"]), on(chosen["a"])) == ({1}, {0, 1})


@pytest.mark.parametrize("reset, left", [("init", 0.0), ("keep", 1.5)])
def test_the_loop_takes_steps_and_resets_moments_by_hand(reset, left):
    # Momentum .5, rate 1, gradient of ones. A = {0, 1}, then {0, 2} from step 2 on.
    params = {"w": np.array([8.0, 4.0, 0.0]), "bias": np.array([1.0])}
    history = train(
        params,
        {"w": mask_of([0, 1], 3)},
        sgd(1.0, momentum=0.5),
        lambda alpha, step: {path: np.ones_like(a) for path, a in alpha.items()},
        lambda run: {"w": mask_of([0, 2], 3)},
        due=every(2),
        steps=3,
        reset=reset,
    )
    # Traces 1 and 1.5: 8 - 1 - 1.5, 4 - 2.5 leaves A. Then trace 1.75, and 1 for the new.
    assert [s.theta["w"].tolist() for s in history] == [
        [8.0, 4.0, 0.0],
        [7.0, 3.0, 0.0],
        [5.5, 0.0, 0.0],
        [3.75, 0.0, -1.0],
    ]
    assert history[2].moments["w"]["trace"].tolist() == [1.5, left, 0.0]
    assert history[3].moments["w"]["trace"].tolist() == [1.75, left / 2, 1.0]
    # The dense leaf: 1 - 1 - 1.5 - 1.75, its moments untouched.
    assert history[3].theta["bias"].tolist() == [-3.25]


# GSE
THETA = np.zeros((4, 4))
THETA.flat[[0, 1, 5, 10, 15]] = [0.9, -0.2, 0.5, -0.1, 0.7]
FORWARD = mask_of([0, 1, 5, 10, 15])
GRAD = np.zeros((4, 4))
GRAD.flat[[2, 3, 4, 7, 10, 13]] = [0.1, 9.0, -0.8, 0.3, 5.0, -0.3]


@pytest.mark.parametrize(
    "candidates, alpha, regrow, active",
    [
        # ceil(.5 * 5) = 3 of {2, 4, 7, 13}: .8, .3, .3 grow; .1, .2, .5 go. Entry 3 has
        # the largest gradient and was not drawn.
        ([2, 2, 5, 7, 13, 4], 0.5, False, {0, 4, 7, 13, 15}),
        # 2: the tie of 7 and 13 goes to 7; 10 and 1 are pruned.
        ([2, 2, 5, 7, 13, 4], 0.4, False, {0, 4, 5, 7, 15}),
        # One distinct candidate off A: k = 1.
        ([5, 0, 2, 2], 0.4, False, {0, 1, 2, 5, 15}),
        # None: nothing moves.
        ([5, 0], 0.4, False, {0, 1, 5, 10, 15}),
        # Pruned 10 is a candidate, but S excludes A: only 2 grows for it.
        ([10, 2], 0.4, False, {0, 1, 2, 5, 15}),
        # Allowed to grow again: 10 and 1 go, 10 returns with 2.
        ([10, 2], 0.4, True, {0, 2, 5, 10, 15}),
        # Everything: 3 and 4; with regrowth 3 and 10, which is RigL.
        (None, 0.4, False, {0, 3, 4, 5, 15}),
        (None, 0.4, True, {0, 3, 5, 10, 15}),
        ([3, 4], 0.0, False, {0, 1, 5, 10, 15}),
    ],
)
def test_gse_refresh(candidates, alpha, regrow, active):
    new = gse.refresh(THETA, FORWARD, candidates, GRAD, alpha, regrow)
    assert on(new) == active


def test_gse_global_moves_entries_between_layers():
    theta = {"a": np.array([[3.0, 1.0], [0, 0]]), "b": np.array([[0.5, 0], [0.2, 2.0]])}
    forward = {"a": mask_of([0, 1], (2, 2)), "b": mask_of([0, 2, 3], (2, 2))}
    grad = {"a": np.array([[0, 0], [0.1, 0.9]]), "b": np.array([[0, 0.5], [0, 0]])}
    # ceil(.4 * 5) = 2: a3 and b1 grow (.9, .5), b2 and b0 go (.2, .5).
    new = gse.refresh_global(theta, forward, {"a": [2, 3], "b": [1]}, grad, 0.4)
    assert (on(new["a"]), on(new["b"])) == ({0, 1, 3}, {1, 3})
    # Layer by layer ceil(.4 * 2) = 1 and ceil(.4 * 3) = 2, but b has one candidate.
    assert on(gse.refresh(theta["a"], forward["a"], [2, 3], grad["a"], 0.4)) == {0, 3}
    assert on(gse.refresh(theta["b"], forward["b"], [1], grad["b"], 0.4)) == {0, 1, 3}


H = np.array([[1.0, -2.0], [3.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
DELTA = np.array([[1.0, 1.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])


def test_gse_distributions():
    f, g = gse.grabo(H, DELTA)  # |h|1 = 3, 3, 0, 2 and |delta|1 = 2, 2, 3, 0.
    assert f.tolist() == [3 / 8, 3 / 8, 0, 2 / 8]
    assert g.tolist() == [2 / 7, 2 / 7, 3 / 7, 0]
    signs = np.array([1.0, -1.0])  # h s = 3, 3, 0, -2 and delta s = 0, -2, -3, 0.
    f, g = gse.graest(H, DELTA, signs)
    assert f.tolist() == [3 / 8, 3 / 8, 0, 2 / 8]
    assert g.tolist() == [0, 2 / 5, 3 / 5, 0]
    assert gse.sketch(H, DELTA, signs)[0].tolist() == [0, -6, -9, 0]
    f, g = gse.uniform(H, DELTA)
    assert (f.tolist(), g.tolist()) == ([0.25] * 4, [0.25] * 4)
    assert gse.grabo(0 * H, DELTA)[0].tolist() == [0.25] * 4  # No activation at all.


def test_grabo_bounds_the_gradient_entrywise():
    rng = np.random.default_rng(0)
    h, delta = rng.normal(size=(6, 9)), rng.normal(size=(5, 9))
    bound = np.outer(abs(h).sum(1), abs(delta).sum(1))
    assert (abs(gse.gradient(h, delta)) <= bound).all()
    assert (abs(gse.gradient(h, delta)) < bound / 2).any()
    # One example: equality. Both sides are the same products.
    one = np.outer(abs(h[:, 0]), abs(delta[:, 0]))
    assert (abs(gse.gradient(h[:, :1], delta[:, :1])) == one).all()


def test_graest_is_unbiased():
    rng = np.random.default_rng(1)
    h, delta = rng.normal(size=(4, 8)), rng.normal(size=(4, 8))
    n = 10_000
    signs = rng.choice([-1.0, 1.0], size=(n, 8))
    draws = np.array([gse.sketch(h, delta, s) for s in signs])
    error = draws.std(0, ddof=1) / np.sqrt(n)
    # 16 entries within 4.5 standard errors: a chance of one in ten thousand to fail.
    assert (abs(draws.mean(0) - gse.gradient(h, delta)) < 4.5 * error).all()
    # Signs drawn apart for h and delta would give zero, not the gradient.
    apart = np.array(
        [np.outer(h @ s, delta @ t) for s, t in zip(signs, signs[::-1], strict=True)]
    )
    assert (abs(apart.mean(0) - gse.gradient(h, delta)) > 10 * error).any()


def test_sampling_by_inverse_cdf():
    f, g = gse.grabo(H, DELTA)
    # Cumulative 3/8, 6/8, 6/8, 1: an edge belongs to the next, entry 2 is never drawn.
    uniforms = np.array([0.0, 0.374, 0.375, 0.74, 0.75, 1 - 2**-53])
    assert gse.inverse_cdf(f, uniforms).tolist() == [0, 0, 1, 1, 3, 3]
    # Columns cumulative 2/7, 4/7, 1: .5 is column 1, .6 column 2. Repeats stay.
    pairs = np.array([[0.0, 0.5], [0.75, 0.6], [0.75, 0.6]])
    assert gse.sample_pairs(f, g, pairs).tolist() == [1, 14, 14]


def test_patches_turn_a_convolution_into_a_matrix_product():
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    assert gse.patches(x, (1, 2)).tolist() == [[0, 1, 3, 4, 6, 7], [1, 2, 4, 5, 7, 8]]
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 2, 2, 3))
    h = gse.patches(x, (2, 2), strides=(2, 1), padding=1)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((2, 3, 4, 3))
    for r in range(3):
        for c in range(4):
            window = padded[:, 2 * r : 2 * r + 2, c : c + 2]
            y[:, r, c] = np.tensordot(window, kernel, axes=3)
    product = kernel.reshape(8, 3).T @ h
    np.testing.assert_allclose(product, gse.positions_of_outputs(y), atol=1e-12)


def test_cosine_and_the_initial_graph():
    values = [gse.cosine(t, 0.3, 10) for t in (0, 5, 10, 11)]
    np.testing.assert_allclose(values, [0.3, 0.15, 0.0, 0.0], atol=1e-16)
    assert [gse.er_count(4, 4, e) for e in (0.5, 0.3, 9.0)] == [4, 3, 16]


def test_gse_candidates_by_what_a_layer_sees():
    asked = []

    def uniforms(step, path, n):
        asked.append((step, path, n))
        return np.array([[0.3, 0.1], [0.5, 0.3], [0.99, 0.99]])

    def draws(signs=None):
        observed = gse.Observed(H, DELTA)
        draw = gse.sampled(lambda step, path: observed, uniforms, 0.6, signs)
        return draw(7, "a", Run(7, {}, {"a": FORWARD}, {}, {})).tolist()

    # f is 3, 3, 0, 2 of 8, g is 2, 2, 3, 0 of 7; three pairs, of (0, 0) (1, 1) (3, 2).
    assert draws() == [0, 5, 14]
    # f is 1, 3, 0, 0 of 4: (1, 0) (1, 1) (1, 2).
    assert draws(lambda step, path: np.array([1.0, 1.0])) == [4, 5, 6]
    # g is 0, 2, 3, 0 of 5, f as by GraBo: (0, 1) (1, 1) (3, 2).
    assert draws(lambda step, path: np.array([1.0, -1.0])) == [1, 5, 14]
    assert asked == [(7, "a", 3)] * 3  # ceil(.6 * 5)


def test_gse_perceptron_has_the_gradient_of_its_loss():
    rng = np.random.default_rng(2)
    x, wanted = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    weights = [rng.normal(size=shape) for shape in ((3, 4), (4,), (4, 2))]

    def slope(i, at):
        one, shift, two = (w.astype(complex) for w in weights)
        (one, shift, two)[i][at] += 1e-30j
        return ((np.tanh(x @ one + shift) @ two - wanted) ** 2).mean().imag / 1e-30

    first, last = gse.perceptron(x, wanted, *weights)
    found = [gse.gradient(*first), first.delta.sum(1), gse.gradient(*last)]
    for i, gradient in enumerate(found):
        expected = [slope(i, at) for at in np.ndindex(gradient.shape)]
        np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-12)
