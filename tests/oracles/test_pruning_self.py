"""Magnitude family against examples worked by hand."""

import math
from itertools import pairwise

import numpy as np
from oracle import every, sgd

from oracles import dense, pruning
from oracles.marks import mask_of, on

# Magnitudes 1 to 8, each twice.
THETA = np.array(
    [[1.0, -2, 3, -4], [5, -6, 7, -8], [8, 7, -6, 5], [4, -3, 2, 1]], np.float64
)
MIDDLE = {4, 5, 6, 7, 8, 9, 10, 11}


def test_cubic():
    # .9 - .9 * (1/2)^3 = .7875; from .5: .9 - .4/8 = .85. Constant outside.
    steps = (5, 10, 15, 20, 30)
    values = [pruning.cubic(t, 10, 20, 0.9) for t in steps]
    np.testing.assert_allclose(values, [0, 0, 0.7875, 0.9, 0.9], atol=1e-15)
    values = [pruning.cubic(t, 10, 20, 0.9, 0.5) for t in steps]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.85, 0.9, 0.9], atol=1e-15)


def test_prune_layerwise_and_globally():
    scores = {"w": abs(THETA)}
    assert on(pruning.prune(scores, 0.75)["w"]) == {6, 7, 8, 9}
    assert on(pruning.prune(scores, 0.6875)["w"]) == {5, 6, 7, 8, 9}  # 5 before 10.
    among = {"w": mask_of(range(8))}
    assert on(pruning.prune(scores, 0.75, among)["w"]) == {4, 5, 6, 7}
    assert on(pruning.prune(scores, 0.25, among)["w"]) == set(range(8))  # 12 of 8: all.
    two = {"a": np.array([[3.0, 1.0]]), "b": np.array([[2.0, 3.5]])}
    layer = pruning.prune(two, 0.5)
    assert (on(layer["a"]), on(layer["b"])) == ({0}, {1})
    world = pruning.prune({"a": two["a"] / 10, "b": two["b"]}, 0.5, scope="global")
    assert (on(world["a"]), on(world["b"])) == (set(), {0, 1})


def test_saliency_and_snip():
    theta, g = np.array([2.0, -1, 4, 0.5]), np.array([1.0, -3, 0.25, 8])
    assert pruning.saliency(theta, g).tolist() == [2, 3, 1, 4]
    batches = [{"w": np.array([1.0, 2])}, {"w": np.array([-1.0, 4])}]
    weights = {"w": np.array([1.0, -2])}
    # Mean gradients 0 and 3; mean sizes 1 and 3.
    assert pruning.snip(weights, batches)["w"].tolist() == [0, 6]
    assert pruning.snip(weights, batches, "score")["w"].tolist() == [1, 6]
    assert pruning.snip(weights, batches[:1])["w"].tolist() == [1, 4]


def run_of(sparsity, due, **options):
    return pruning.pruning(
        {"w": THETA, "bias": np.ones(2)},
        sgd(0.1, momentum=0.9),
        lambda alpha, step: {path: 0.1 * a for path, a in alpha.items()},
        due=due,
        sparsity=sparsity,
        sparse=("w",),
        **options,
    )


def test_gradual_pruning_follows_the_cubic():
    history = run_of(lambda t: pruning.cubic(t, 0, 40, 0.9), every(10))
    # .9 (1 - (1 - t/40)^3): .5203, .7875, .8859, .9 of 16: 7.7, 3.4, 1.8, 1.6 are left.
    expected = [16] * 10 + [8] * 10 + [3] * 10 + [2] * 21
    assert [int(s.forward["w"].sum()) for s in history] == expected
    for before, after in pairwise(history):
        assert not (after.forward["w"] & ~before.forward["w"]).any()
        assert not after.theta["w"][~after.forward["w"]].any()
        assert not after.moments["w"]["trace"][~after.forward["w"]].any()
    # All weights shrink alike, so the largest stay, 7 before 8.
    assert on(history[-1].forward["w"]) == {7, 8}


def test_one_shot_random_and_saliency_runs():
    history = run_of(lambda t: 0.5, lambda step: step == 3)
    assert [int(s.forward["w"].sum()) for s in history[:5]] == [16, 16, 16, 8, 8]
    assert on(history[-1].forward["w"]) == MIDDLE
    draws = np.arange(16.0).reshape(4, 4)
    history = run_of(lambda t: 0.75, every(5), score=lambda run, path: draws)
    assert on(history[-1].forward["w"]) == {12, 13, 14, 15}
    history = run_of(
        lambda t: 0.875,
        every(5),
        score=lambda run, path: pruning.saliency(run.theta[path], run.grads[path]),
    )
    assert on(history[-1].forward["w"]) == {7, 8}
    fixed = pruning.fixed(
        {"w": THETA},
        {"w": mask_of([0, 3])},
        sgd(0.1),
        lambda alpha, step: {"w": np.ones((4, 4))},
        steps=2,
    )
    assert on(fixed[-1].theta["w"]) == on(fixed[-1].forward["w"]) == {0, 3}


def test_soft_threshold():
    theta = np.array([4.0, -3, 2, -1])
    for k, expected, tau in (
        (2, [2, -1, 0, 0], 2),
        (3, [3, -2, 1, 0], 1),
        (4, [4, -3, 2, -1], 0),
        (0, [0, 0, 0, 0], 4),
    ):
        alpha, found = dense.soft_threshold(theta, k)
        assert (alpha.tolist(), float(found)) == (expected, tau)


def test_straight_through_moves_all_of_theta():
    options = {"due": every(1), "k": {"w": 2}, "steps": 1}
    seen = []

    def grad(alpha, step):
        seen.append(alpha["w"].tolist())
        return {"w": np.array([3.0, 0, -2, 0])}

    params = {"w": np.array([4.0, 3, 2, 1])}
    hard = dense.straight_through(params, sgd(1.0), grad, **options)
    soft = dense.straight_through(params, sgd(1.0), grad, soft=True, **options)
    # Soft: tau is 2, the third largest.
    assert seen == [[4, 3, 0, 0], [2, 1, 0, 0]]
    for history in (hard, soft):
        assert history[1].theta["w"].tolist() == [1, 3, 4, 1]
        assert on(history[1].forward["w"]) == {1, 2}
    assert hard[1].alpha["w"].tolist() == [0, 3, 4, 0]
    assert soft[1].alpha["w"].tolist() == [0, 2, 3, 0]


def test_acdc_phases_and_run():
    def phase(t):
        return dense.acdc_phase(t, 2, 2, 1, 8)

    assert "".join(phase(t)[0] for t in range(12)) == "ddccdccdcccc"
    history = dense.acdc(
        {"w": np.array([4.0, 3, 2, 1])},
        sgd(1.0),
        lambda alpha, step: {"w": np.array([0.0, 0, -1, -1])},
        phase=phase,
        sparsity=0.5,
        steps=5,
    )
    assert [s.theta["w"].tolist() for s in history] == [
        [4, 3, 2, 1],
        [4, 3, 3, 2],
        [4, 0, 4, 0],  # Was 4, 3, 4, 3: the top two stay.
        [4, 0, 5, 0],
        [4, 0, 6, 0],  # Dense again, from zero.
        [4, 0, 7, 0],  # Was 4, 0, 7, 1: compressed for steps 5 and 6.
    ]
    assert [int(s.backward["w"].sum()) for s in history] == [4, 4, 2, 2, 4, 2]


def test_acdc_resets_all_moments_where_asked():
    def traces(reset):
        history = dense.acdc(
            {"w": np.array([4.0, 3, 2, 1])},
            sgd(1e-3, momentum=0.5),
            lambda alpha, step: {"w": np.ones(4)},
            phase=lambda t: "compressed" if t in (1, 2) else "dense",
            sparsity=0.5,
            steps=3,
            reset=reset,
        )
        return history[3].moments["w"]["trace"].tolist()

    assert traces("moved") == [1.75, 1.75, 0, 0]
    assert traces("all") == [0, 0, 0, 0]


def test_granet_prunes_then_regrows_by_gradient():
    forward, grad = {"w": np.ones((4, 4), bool)}, np.zeros((4, 4))
    grad.flat[[0, 4, 11, 15]] = [9, 3, 2, 8]
    # 8 stay: 4 to 11. Of these the two fives go (4, 11), and 0 and 15 grow.
    new = pruning.granet({"w": THETA}, forward, {"w": grad}, 0.5, 0.25)["w"]
    assert on(new) == MIDDLE - {4, 11} | {0, 15}
    grad.flat[[0, 15]] = 1
    new = pruning.granet({"w": THETA}, forward, {"w": grad}, 0.5, 0.25)["w"]
    assert on(new) == MIDDLE
    # .3 * 8 = 2.4: two, or three rounded up. 5 before 10, so 10 goes, 0 grows.
    args = {"w": THETA}, forward, {"w": grad}, 0.5, 0.3
    assert on(pruning.granet(*args)["w"]) == MIDDLE
    up = pruning.granet(*args, count=math.ceil)["w"]
    assert on(up) == MIDDLE - {10} | {0}
