"""AC/DC: training that alternates between dense and compressed phases."""

from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from topkast_jax import distribution as distribution_lib
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Method
from topkast_jax.distribution import Distribution
from topkast_jax.methods.pruning import falling
from topkast_jax.methods.shrinking import Budget, Scope, shrinking
from topkast_jax.score import magnitude
from topkast_jax.structure import Structure, unstructured


def acdc(
    sparsity: float,
    *,
    warmup: int,
    compressed: int,
    dense: int,
    last: int,
    scope: Scope = "global",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
) -> Method:
    """AC/DC: alternating compressed and decompressed training.

    Dense for `warmup` steps; then compressed and dense phases take turns, with the
    lengths given; from `last` on compressed to the end:

        dense:       A = B = everything
        compressed:  A = B = the k largest |theta| at the turn

    What a compressed phase leaves out is zero, so a dense phase goes on from the sparse
    weights. Moments follow `tk.sparse(..., reset=...)`: as a rule those of entries that
    return begin anew. (The paper resets momentum, of all entries, where a dense phase
    begins.)

    Corner cases: the paper compares magnitudes over all layers, the default here, and
    then a parameter may be left without entries in a phase; in the next dense phase
    they return. `last` within a compressed phase prolongs it; within a dense one it
    ends it.

    Args:
      sparsity: fraction of zeros in compressed phases, in [0, 1).
      warmup: steps of the first dense phase, at least 1.
      compressed: steps of a compressed phase, at least 1.
      dense: steps of a dense phase, at least 1.
      last: step from which on training is compressed, at least `warmup`.
      scope: "global", or "layer", the paper's uniform variant.
      distribution: how sparsity is spread over parameters; for scope="layer".
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: a number out of range, or a structure that cannot compete.
    Example:
      >>> import numpy as np, topkast_jax as tk
      >>> method = tk.acdc(0.9, warmup=2, compressed=3, dense=2, last=9)
      >>> np.flatnonzero(method.due(np.arange(12))).tolist()  # where phases begin
      [2, 5, 7]

    Reference:
      Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks", 2021, arXiv 2106.12379.
    """
    for name, value in (
        ("warmup", warmup),
        ("compressed", compressed),
        ("dense", dense),
    ):
        if value < 1:
            raise ValueError(f"acdc: {name}={value} must be at least 1 step")
    if last < warmup:
        raise ValueError(
            f"acdc: last={last} comes before the first dense phase ends, at "
            f"warmup={warmup}"
        )

    def is_compressed(step: Any) -> Any:
        turn = (step - warmup) % (compressed + dense)
        return (step >= warmup) & ((step >= last) | (turn < compressed))

    def turns(step: Any) -> Any:
        return (step > 0) & (is_compressed(step) != is_compressed(step - 1))

    def which(step: Any) -> Any:
        return jnp.asarray(is_compressed(step)).astype(jnp.int32)

    base = falling(sparsity, 0.0, scope, distribution, structure, where, "magnitude")
    method = shrinking(
        base,
        "acdc",
        Budget((Fraction(1), Fraction(0)), which),
        turns,
        magnitude,
        sparsities=(0.0, sparsity),
        scope=scope,
        nested=False,
    )
    compete = "; all parameters compete for the sum" if scope == "global" else ""
    note = f"everything in dense phases, k_A entries in compressed ones, the last from step {last}"
    return method._replace(note=note + compete)
