"""What every config says of sparsity: the arguments it takes, and `config.sparse`.

Arguments, of every config file:

    method=rigl             or dense, or any of tk.METHODS; Top-KAST where left out
    forward=0.95            sparsity of A, of all methods
    backward=0.9            of B, Top-KAST alone; .1 below the forward one where left out
    structure=blocks:8x128  or fan_in, fan_in:1x64, n_of_m:32
    layout=packed           or block; masked where left out
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder

ARGUMENTS: dict[str, Any] = dict(
    method="top_kast",
    forward=None,
    backward=None,
    structure="unstructured",
    layout="masked",
)
"""Defaults for `common.parse`."""
DROP_GROW: dict[str, dict[str, Any]] = {
    "set": {},
    "rigl": {},
    "rigl_itop": {},
    # beta of the mean gradient; whether entries move between layers.
    "snfs": dict(momentum=0.9, redistribute=True),
    # lambda of |theta| + lambda |g|; whether A is larger until the next refresh.
    "mest": dict(weight=0.01, soft=False),
    # Share of the fan-in that must be salient, else a neuron goes.
    "srigl": dict(gamma_sal=0.3),
    # The first H; by how much its count may be off before H changes.
    "dsr": dict(threshold=1e-3, tolerance=0.1),
    # "grabo" and "graest" draw by statistics, "all" takes every entry; candidates for
    # each weight; or "global".
    "gse": dict(candidates="uniform", subset=1.0, scope="layer"),
}
"""What these methods take beside a drop fraction."""
FIRST = {
    **dict.fromkeys(("static", "deep_r", "granet", *DROP_GROW), "random"),
    # Where initial_sparsity is not 0, else all weights.
    **{"magnitude": "magnitude", "saliency": "magnitude", "random_pruning": "random"},
    **{"top_kast": "magnitude", "straight_through": "magnitude"},
}
"""The first A of these methods; the others begin dense."""
OWN_DISTRIBUTION = {"granet": "erk", "gse": "erdos_renyi"}


class Chosen(NamedTuple):
    """What the arguments say.

    Attributes:
      suffix: of the name of the run.
    """

    method: str
    forward: float
    backward: float
    structure: str
    layout: str
    suffix: str


def choose(args: Mapping[str, Any]) -> Chosen:
    """Reads `ARGUMENTS` after parsing.

    Raises:
      ValueError: arguments that have no meaning together.
    """
    method, structure, layout = args["method"], args["structure"], args["layout"]
    structured, masked = structure != "unstructured", layout == "masked"
    if method == "dense" and (structured or not masked or args["forward"] is not None):
        raise ValueError(
            "config arguments forward=, structure= and layout= have no meaning for "
            "method=dense"
        )
    if method != "top_kast" and args["backward"] is not None:
        raise ValueError("config argument backward= is for method=top_kast only")
    forward = 0.9 if args["forward"] is None else args["forward"]
    backward = args["backward"]
    if backward is None:
        backward = max(0.0, round(forward - 0.1, 6))
    suffix = method + ("" if method == "dense" else f"-{forward:g}")
    if not masked:
        suffix += f"-{layout}"
    if structured:
        suffix += "-" + structure.replace(":", "-")
    if method == "srigl" and not structured:
        structure = "fan_in"  # what it is about
    return Chosen(method, forward, backward, structure, layout, suffix)


def settings(
    chosen: Chosen,
    *,
    refresh: int,
    where: str = "",
    axes: Sequence[tuple[str, str]] = (),
    distribution: str = "",
    penalty: float = 1e-4,
) -> ml_collections.ConfigDict:
    """`config.sparse`, every value of which can be changed on the command line.

    Args:
      chosen: from `choose`.
      refresh: steps between two choices of masks.
      where: globs of sparse parameters, comma separated; "": all kernels.
      axes: what the axes of a kernel mean, (glob, letters); see `tk.axes`.
      distribution: of sparsity over parameters; "": uniform, or the method's own.
      penalty: of Top-KAST.
    """
    method, forward, backward, structure, layout, _ = chosen
    masked = layout == "masked"
    refreshes = dict(
        refresh=refresh,  # steps between two choices of masks
        refresh_start=placeholder(int),  # the first; None: after `refresh` steps
        refresh_stop=placeholder(int),  # none from this step on; None: to the last step
    )
    ramp = dict(
        start=placeholder(int),  # of the fall in density; None: a tenth of the run
        stop=placeholder(int),  # None: three quarters of the run
        ramp="cubic",  # or "linear"
    )
    sparse = ml_collections.ConfigDict(dict(method=method))
    if method == "dense":
        return sparse
    sparse.update(
        reset="init",  # moments of entries that enter or leave B: "init" or "keep"
        where=where,  # globs of sparse parameters, comma separated; "": all kernels
        # What the axes of a kernel mean, first match wins: inputs and outputs.
        axes=axes,
        layout=layout,  # or "packed", "block": see README.md
        refresh_delay=0,  # steps from the choice of masks to their coming into force
        reservoir="memory",  # of packed layouts, or "files" in the workdir
        # Or "blocks:8x128", "fan_in", "fan_in:1x64", "n_of_m:32".
        structure=structure,
        # Selections apart, by which packed parameters are cut over a mesh.
        groups=1,
        groups_along="outputs",  # or "inputs", or ((glob, axis), ...)
        # Or "uniform", "erk", "erdos_renyi", {glob: sparsity}, "of_masks" (of init).
        distribution=distribution or OWN_DISTRIBUTION.get(method, "uniform"),
        begin=placeholder(int),  # dense before this step; None: the method at once
        # Whether the log tells what share of the weights outside the first A has been in
        # A since: masked layout, two bytes a weight.
        track_reservoir=False,
    )
    if method in FIRST:
        sparse.init = FIRST[method]  # the first A: "random", "magnitude", or masks.npz
    if method == "top_kast":
        sparse.update(
            forward_sparsity=forward,
            backward_sparsity=backward,
            penalty=penalty,  # weight of the exploration penalty
            penalty_norm="l2",  # or "l1"
            penalty_mode="gradient",  # or "decoupled", after the optimizer
            stop=placeholder(int),  # last choice of masks, then B := A; None: never
            explore="top",  # B\A: the next largest, or "random"
            **refreshes,
        )
    elif method in DROP_GROW:
        sparse.update(
            sparsity=forward,
            drop_fraction=0.3,  # share of A replaced at a refresh
            drop_decay="cosine",  # to 0 at refresh_stop or the last step, or "constant"
            **refreshes,
            **DROP_GROW[method],
        )
        if method == "srigl" and not masked:
            sparse.gamma_sal = 0.0  # packed arrays cannot lose neurons
    elif method == "deep_r":
        sparse.update(
            sparsity=forward,
            l1=1e-5,  # weight of the penalty
            temperature=1e-9,  # of the noise: sqrt(2 eta T) at each step
            scope="network",  # within which entries move, or "leaf"
            strict=False,  # whether a weight of exactly zero dies
            **refreshes | dict(refresh=1),
        )
    elif method in ("magnitude", "saliency", "random_pruning"):
        sparse.update(
            sparsity=forward,
            initial_sparsity=0.0,
            scope="layer",  # or "global"
            **ramp,
            **refreshes,
        )
    elif method == "granet":
        sparse.update(
            sparsity=forward,
            initial_sparsity=0.5,
            drop_fraction=0.5,  # share of A replaced at a refresh
            drop_decay="cosine",
            scope="global",  # or "layer"
            **ramp,
            **refreshes,
        )
    elif method == "one_shot":
        sparse.update(
            sparsity=forward,
            at=placeholder(int),  # None: half of the run
            score="magnitude",  # or "saliency", "random"
            scope="layer",
        )
    elif method == "snip":
        sparse.update(
            sparsity=forward,
            batches=1,  # that are looked at before the choice
            average="gradient",  # over batches, or "score"
            scope="global",
        )
    elif method == "straight_through":
        # Masks change at every step, as in the papers.
        sparse.update(sparsity=forward, soft=False, refresh=1)
    elif method == "acdc":
        sparse.update(
            sparsity=forward,
            warmup=placeholder(int),  # dense steps first; None: a tenth of the run
            compressed=placeholder(int),  # of a phase; None: a twentieth
            dense=placeholder(int),  # of a phase; None: a twentieth
            last=placeholder(int),  # compressed from here on; None: after four fifths
            scope="global",
        )
    else:
        sparse.update(sparsity=forward)
    return sparse
