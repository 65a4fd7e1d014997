"""Dynamic family against examples worked by hand, and budgets over 50 steps."""

import math

import numpy as np
from oracle import every, sgd

from oracles import adaptive, dynamic, mest, neurons
from oracles.loop import by_scores, nnz
from oracles.marks import mask_of, on

SMALL = (2, 2)


def first(k, allowed):
    """A draw: the lowest indices."""
    return by_scores(-np.arange(allowed.size).reshape(allowed.shape))(k, allowed)


def test_snfs_regrows_by_share_of_momentum():
    theta = {"a": np.array([[4.0, 1], [0, 0]]), "b": np.array([[3.0, 2], [1, 0]])}
    forward = {"a": mask_of([0, 1], SMALL), "b": mask_of([0, 1, 2], SMALL)}
    momentum = {"a": np.array([[1.0, -3], [0.5, 7]]), "b": np.array([[1.0, 0], [2, 9]])}
    assert dynamic.mean_momentum(momentum, forward) == {"a": 2.0, "b": 1.0}
    # 1 of 2 and 2 of 3 (1.5 to the even 2) go; of the 3, two thirds regrow in a: 7, 3.
    new = dynamic.snfs(theta, forward, momentum, 0.5)
    assert (on(new["a"]), on(new["b"])) == ({0, 1, 3}, {0, 3})
    # What was dropped barred: a has room for 2 and 3, b only for 3.
    new = dynamic.snfs(theta, forward, momentum, 0.5, regrow=False)
    assert (on(new["a"]), on(new["b"])) == ({0, 2, 3}, {0, 3})
    # Each its own: one in a, two in b.
    new = dynamic.snfs(theta, forward, momentum, 0.5, redistribute=False)
    assert (on(new["a"]), on(new["b"])) == ({0, 3}, {0, 2, 3})
    assert dynamic.smoothed(np.array([2.0]), np.array([4.0]), 0.5).tolist() == [3.0]


def test_rigl_and_the_exploration_rate():
    theta, forward = np.array([2.0, 1, 0, 0]), mask_of([0, 1], 4)
    grad = np.array([0.0, 9, 5, 5])
    assert on(dynamic.rigl(theta, forward, grad, 0.5)) == {0, 1}  # Drops and regrows.
    assert on(dynamic.rigl(theta, forward, grad, 0.5, regrow=False)) == {0, 2}
    assert on(dynamic.rigl(theta, forward, grad, 0.6, count=math.ceil)) == {1, 2}
    last = np.array([3, 2, 1, 0])
    new = dynamic.rigl(theta, forward, grad, 0.5, regrow=False, ranks=last)
    assert on(new) == {0, 3}
    gradients = [np.array([0.0, 0, 5, 0]), np.array([0.0, 0, 0, 5])]
    history = dynamic.rigl_itop_run(
        {"w": theta},
        {"w": forward},
        sgd(0.1),
        lambda alpha, step: {"w": gradients[step]},
        due=every(1),
        steps=2,
    )
    assert [on(s.forward["w"]) for s in history] == [{0, 1}, {0, 2}, {0, 3}]
    assert dynamic.explored(history) == [(2, 4), (3, 4), (4, 4)]
    assert dynamic.exploration_rate(history) == 1.0


def test_mest():
    theta, grad, forward = np.zeros((4, 4)), np.zeros((4, 4)), mask_of([0, 1, 2])
    theta.flat[[0, 1, 2]] = [1, -2, 1.5]
    grad.flat[[0, 9]] = [-3, 99]
    # 1 + .5 * 3 = 2.5, 2, 1.5: entry 2 goes; without the gradient entry 0.
    assert on(mest.mest(theta, forward, grad, 0.5, 2, 3, first)) == {0, 1, 2}
    barred = mest.mest(theta, forward, grad, 0.5, 2, 3, first, regrow=False)
    assert on(barred) == {0, 1, 3}
    plain = mest.mest(theta, forward, grad, 0.0, 2, 3, first, regrow=False)
    assert on(plain) == {1, 2, 3}
    soft = mest.mest(theta, forward, grad, 0.5, 3, 5, first)
    assert on(soft) == {0, 1, 2, 3, 4}
    rates = [mest.elastic(t, (0.3, 0.1, 0.0), (10, 20)) for t in (9, 10, 19, 20)]
    assert rates == [0.3, 0.1, 0.1, 0.0]


def test_srigl_ablates_neurons_and_keeps_the_fan_in():
    theta, grad = np.zeros((4, 4)), np.zeros((4, 4))
    theta[:2, 0], theta[:2, 1], theta[:2, 2], theta[2:, 3] = (
        (8, 7),
        (6, 5),
        (1, 2),
        (4, 3),
    )
    grad[3, 0], grad[0, 3], grad[1, 3], grad[2, 1], grad[2:, 2] = 9, 8, 7, 6, (0.1, 0.2)
    forward = theta != 0
    kept = neurons.salient(theta, forward, grad, 4)
    assert kept.sum(0).tolist() == [3, 3, 0, 2]

    def columns(gamma, **options):
        new = neurons.srigl(theta, forward, grad, 0.5, gamma=gamma, **options)
        return [on(new[:, j]) for j in range(4)]

    # 8, 7, 6, 5 stay; the third column regrows its largest gradients, the fourth too.
    assert columns(0.0) == [{0, 1}, {0, 1}, {2, 3}, {0, 1}]
    # At least .5 * 2 salient: the third goes, 8 // 3 = 2.
    assert columns(0.5) == [{0, 1}, {0, 1}, set(), {0, 1}]
    # At least 3: two are left, which are dense.
    full = {0, 1, 2, 3}
    assert columns(1.5) == [full, full, set(), set()]
    # At least 20: two must stay for a budget of 8, four inputs each.
    assert columns(10.0) == [full, full, set(), set()]
    # Budget 12, fan-in 3 with none ablated, 4 with one.
    assert columns(0.5, budget=12) == [full, full, set(), full]
    # .7 * 2 = 1.4: 2 are enough either way; 2.2: only rounded down.
    assert columns(1.1) == [full, full, set(), set()]
    assert columns(1.1, floor=True) == columns(0.5)
    # A column that stays dead, although it has the most salient weights.
    dead = np.array([True, False, False, False])
    assert columns(0.5, dead=dead)[0] == set()


def test_srigl_brings_any_mask_to_a_constant_fan_in():
    theta, grad = np.zeros((4, 4)), np.zeros((4, 4))
    theta[:, 0], theta[0, 1:] = (5, 8, 6, 7), (4, 3, 2)
    grad[2, 1], grad[3, 2], grad[0, 3], grad[1, 3] = 1, 1, 9, 1
    # 8 // 4 = 2: the first column keeps its two largest, the others grow one.
    new = neurons.srigl(theta, theta != 0, grad, 0.0, gamma=0.0, budget=8)
    assert [on(new[:, j]) for j in range(4)] == [{1, 3}, {0, 2}, {0, 3}, {0, 1}]


def test_dsr_moves_entries_and_the_threshold():
    theta = {
        "a": np.array([[4.0, 0.5], [0, 0]]),
        "b": np.array([[3.0, -2], [0.2, 0.1]]),
    }
    forward = {"a": mask_of([0, 1], SMALL), "b": np.ones(SMALL, bool)}

    def draw(path, k, allowed):
        return first(k, allowed)

    for target, h in ((1, 0.3), (3, 0.6), (10, 1.2)):
        # Three are below .6; 1 and 2 survive, so 1 and 2 of the three grow.
        new, found = adaptive.dsr(
            theta, forward, 0.6, target=target, tolerance=0.1, draw=draw
        )
        assert (on(new["a"]), on(new["b"])) == ({0, 1}, {0, 1, 2, 3})
        assert found == h
    # H = 2.5: 1 and 1 survive, four grow, but b has room for three: 2 and 2.
    new, _ = adaptive.dsr(theta, forward, 2.5, target=1, tolerance=0.1, draw=draw)
    assert (on(new["a"]), on(new["b"])) == ({0, 1, 2}, {0, 1, 2})
    # H = .15: only b3 goes, and 2 : 3 gives the one to b.
    new, _ = adaptive.dsr(theta, forward, 0.15, target=1, tolerance=0.1, draw=draw)
    assert (nnz(new), on(new["a"])) == (6, {0, 1})
    assert adaptive.next_threshold(1.0, 90, 100, 0.1) == 1.0
    assert adaptive.next_threshold(1.0, 89, 100, 0.1) == 2.0


def test_deep_r_by_hand():
    signs = np.array([[1.0, -1], [1, -1]])
    noise = np.array([[0, 0.5], [-0.3, 9]])
    options = {
        "signs": {"w": signs},
        "learning_rate": 0.5,
        "l1": 0.2,
        "temperature": 1.0,  # sqrt(2 * .5 * 1) = 1
        "noise": lambda step, path: noise,
        "steps": 1,
        "dtype": np.float64,
    }
    args = (
        {"w": np.array([[1.0, -1], [0.1, 0]])},
        {"w": mask_of([0, 1, 2], SMALL)},
        sgd(0.5),
        lambda alpha, step: {"w": np.array([[0.4, 0], [0, 7]])},
    )

    def draw(step, path, k, allowed):
        assert (step, path, k, on(allowed)) == (1, "w", 1, {2, 3})
        return mask_of([3], SMALL)

    # theta: 1 - .2 - .1 = .7; 1 - .1 + .5 = 1.4; .1 - .1 - .3 dies, entry 3 revives.
    _, after = adaptive.deep_r_run(*args, draw=draw, **options)
    assert on(after.forward["w"]) == {0, 1, 3}
    np.testing.assert_allclose(after.theta["w"], [[0.7, -1.4], [0, 0]], atol=1e-15)
    # Over the network: the same here. Revived at once: at zero, still active.
    _, after = adaptive.deep_r_run(
        *args, draw_all=lambda step, k, free: {"w": mask_of([2], SMALL)}, **options
    )
    assert on(after.forward["w"]) == {0, 1, 2}
    np.testing.assert_allclose(after.theta["w"], [[0.7, -1.4], [0, 0]], atol=1e-15)
    # Exactly zero is alive, unless strict.
    zero, one = np.zeros((1, 1)), np.ones((1, 1), bool)
    assert adaptive.deep_r_alive(zero, one, -np.ones((1, 1))).all()
    assert not adaptive.deep_r_alive(zero, one, np.ones((1, 1)), strict=True).any()
