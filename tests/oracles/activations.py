"""Sparse activations and gradients: meProp (arXiv 1706.06197), SWAT (2001.01969).

A linear layer y = x w + b with x [batch, n_in], w [n_in, n_out], in float64. Forward
and gradients are written out; no automatic differentiation.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from oracle import Array, top_k


class Linear(NamedTuple):
    """y, and the gradients of a loss with dL/dy = dy."""

    y: Array
    dx: Array
    dw: Array
    db: Array


def top_rows(x: Array, k: int) -> Array:
    """Keeps the k largest magnitudes of each row; ties to the first column."""
    masks = np.array([top_k(abs(row), k) for row in x])
    return np.where(masks, x, 0.0)


def top_tensor(x: Array, k: int) -> Array:
    """Keeps the k largest magnitudes of the whole array."""
    return np.where(top_k(abs(x), k), x, 0.0)


def top_columns(x: Array, k: int) -> Array:
    """Keeps the k columns with the largest sum of magnitudes over the batch."""
    return np.where(top_k(abs(x).sum(0), k), x, 0.0)


def dense(x: Array, w: Array, b: Array, dy: Array) -> Linear:
    x, w, b, dy = (np.asarray(a, np.float64) for a in (x, w, b, dy))
    return Linear(x @ w + b, dy @ w.T, x.T @ dy, dy.sum(0))


def meprop(
    x: Array, w: Array, b: Array, dy: Array, k: int, *, unified=False, full_bias=True
) -> Linear:
    """Dense forward; backward uses the top k of |dy|, per example.

    `unified`: the same k outputs for the whole batch, by the sum of |dy|. The bias sees
    the whole dy, as in the authors' code; with `full_bias=False` the sparsified one, as
    a literal reading of the paper has it.
    """
    y, _, _, bias = dense(x, w, b, dy)
    few = (top_columns if unified else top_rows)(np.asarray(dy, np.float64), k)
    _, dx, dw, db = dense(x, w, b, few)
    return Linear(y, dx, dw, bias if full_bias else db)


def swat(
    x: Array,
    w: Array,
    b: Array,
    dy: Array,
    k_weights: int,
    k_activations: int,
    *,
    per: str = "tensor",
) -> Linear:
    """Forward with the top weights and dense activations; see below for backward.

    w' = top k_weights of |w| of the layer, x' = top k_activations of |x|:

        y = x w' + b,   dx = dy w'^T,   dw = x'^T dy  (all of w, not only w'),   db = dy 1

    dy itself is never sparsified. `per="tensor"` counts k_activations over the whole
    array, as the authors' code does, "row" over each example.
    """
    x, w, b, dy = (np.asarray(a, np.float64) for a in (x, w, b, dy))
    few_w = top_tensor(w, k_weights)
    few_x = {"tensor": top_tensor, "row": top_rows}[per](x, k_activations)
    return Linear(x @ few_w + b, dy @ few_w.T, few_x.T @ dy, dy.sum(0))


def layer_run(
    w: Array,
    b: Array,
    batches: Callable[[int], tuple[Array, Array]],
    layer: Callable[[Array, Array, Array, Array], Linear],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    steps: int = 50,
) -> list[tuple[Array, Array]]:
    """SGD on mean squared error of one layer, all in float64; (w, b) before each step.

    `batches(step)` gives x and the wanted y; the loss is sum((y - wanted)^2) / (2 batch),
    so dy = (y - wanted) / batch.
    """
    w, b = np.array(w, np.float64), np.array(b, np.float64)
    trace_w, trace_b = np.zeros_like(w), np.zeros_like(b)
    history = [(w, b)]
    for step in range(steps):
        x, wanted = batches(step)
        y = layer(x, w, b, np.zeros((len(x), w.shape[1]))).y
        result = layer(x, w, b, (y - wanted) / len(x))
        trace_w = result.dw + momentum * trace_w
        trace_b = result.db + momentum * trace_b
        w, b = w - learning_rate * trace_w, b - learning_rate * trace_b
        history.append((w, b))
    return history
