"""meProp and SWAT against examples worked by hand."""

import numpy as np

from oracles import activations

X = np.array([[1.0, 2.0], [3.0, -4.0]])
W, B = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([0.0, 1.0])
DY = np.array([[1.0, -2.0], [0.5, 0.25]])


def listed(linear):
    return [part.tolist() for part in linear]


def test_meprop_keeps_the_top_of_each_row_of_the_output_gradient():
    # dy' = (0, -2), (.5, 0).
    y, dx, dw = [[2, 5], [1, -17]], [[4, -6], [0.5, 0.25]], [[1.5, -2], [-2, -4]]
    assert listed(activations.meprop(X, W, B, DY, 1)) == [y, dx, dw, [1.5, -1.75]]
    literal = activations.meprop(X, W, B, DY, 1, full_bias=False)
    assert literal.db.tolist() == [0.5, -2.0]
    # |dy| summed: 1.5 and 2.25, so the second output for both rows.
    unified = activations.meprop(X, W, B, DY, 1, unified=True)
    assert unified.dx.tolist() == [[4, -6], [-0.5, 0.75]]
    assert unified.dw.tolist() == [[0, -1.25], [0, -5]]
    assert listed(activations.meprop(X, W, B, DY, 2)) == listed(
        activations.dense(X, W, B, DY)
    )


def test_swat_sparse_weights_forward_sparse_activations_backward():
    # w' = (0, -2), (0, 3); x' = (0, 0), (3, -4); dw covers all of w.
    assert listed(activations.swat(X, W, B, DY, 2, 2)) == [
        [[0, 5], [0, -17]],
        [[4, -6], [-0.5, 0.75]],
        [[1.5, 0.75], [-2, -1]],
        [1.5, -1.75],
    ]
    rows = activations.swat(X, W, B, DY, 2, 1, per="row")  # x' = (0, 2), (0, -4).
    assert rows.dw.tolist() == [[0, 0], [0, -5]]


def test_layer_run_descends():
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(16, 4)), rng.normal(size=(4, 4))

    def loss(state):
        return ((x @ state[0] + state[1] - x @ w) ** 2).mean()

    start = np.zeros((4, 4)), np.zeros(4)
    options = {"learning_rate": 0.3, "momentum": 0.5}
    ends = []
    for layer in (
        activations.dense,
        lambda *a: activations.meprop(*a, 2),
        lambda *a: activations.swat(*a, 16, 40),
    ):
        history = activations.layer_run(*start, lambda t: (x, x @ w), layer, **options)
        assert len(history) == 51
        ends.append(loss(history[-1]))
    assert ends[0] < 1e-4 * loss(start)
    assert max(ends) < 0.1 * loss(start)
    assert len(set(ends)) == 3
