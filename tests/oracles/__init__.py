"""Oracles of the further methods: plain NumPy, written from the papers.

`loop` takes the steps; `gse`, `pruning`, `dense`, `dynamic`, `mest`, `neurons`,
`adaptive` and `activations` hold one family each. Nothing here imports the library or JAX. Words,
clock and inner optimizers are those of `oracle`: masks are bool arrays of the shape of
theta, a weight matrix reads (in..., out), a refresh *at* step s happens at the end of
step s - 1 with the weights after that step and the gradient that the step has seen.

What holds everywhere unless a docstring says otherwise:

* Equal magnitudes, and equal scores of any kind: the lowest linear (C-order) index
  wins, that is, it is kept, or grown. Over several leaves, the leaf named first wins.
* "The n smallest go" is "the k - n largest stay", so of equal ones the last goes.
* An entry that is in A before and after a refresh never left: it keeps its value and
  its moments, also where it was dropped and grown again within the refresh.
* An entry new to A starts at zero with moments of zero.
* Random choices are handed in: `draw(step, path, k, allowed)` is a mask with k True.
"""
