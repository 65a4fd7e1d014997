"""Always-sparse training in JAX: Top-KAST and its peers as optax transformations."""

import importlib
from typing import Any

from topkast_jax import metrics, ops
from topkast_jax._trees import axes, kernels, masks
from topkast_jax._types import (
    Axes,
    Counts,
    Leaf,
    LeafMasks,
    Masks,
    Method,
    Mixture,
    SparseState,
)
from topkast_jax.activations import meprop, swat
from topkast_jax.convert import convert
from topkast_jax.distribution import by_path, erdos_renyi, erk, of_masks, uniform
from topkast_jax.drop_in import DropInState, drop_in
from topkast_jax.forward import dense_masks, export, sparsify
from topkast_jax.grid import Grid
from topkast_jax.health import Health, NonFinite, check, health
from topkast_jax.layouts.journal import Journal
from topkast_jax.layouts.merge import merge_groups
from topkast_jax.layouts.packed import BlockMatrix, Index
from topkast_jax.layouts.store import Store
from topkast_jax.layouts.store import load as load_store
from topkast_jax.mask_files import from_zeros, load_masks, save_masks
from topkast_jax.matching import (
    Agreement,
    Matched,
    mask_agreement,
    matched_overlap,
)
from topkast_jax.methods import (
    ALIASES,
    METHODS,
    acdc,
    deep_r,
    delayed,
    dsr,
    granet,
    gse,
    magnitude,
    mest,
    one_shot,
    random_pruning,
    rigl,
    rigl_itop,
    saliency,
    set_,
    snfs,
    snip,
    srigl,
    static,
    straight_through,
    top_kast,
)
from topkast_jax.mixture import groups
from topkast_jax.optimizer import sparse
from topkast_jax.packed import due
from topkast_jax.plan import Plan
from topkast_jax.probe import Found, probe, probe_candidates, probe_leaf
from topkast_jax.refresh import Chosen, choose, refresh
from topkast_jax.schedule import at, cosine, cubic, every, first_due
from topkast_jax.select import random_k, top_k, top_k_tree
from topkast_jax.shapes import shapes
from topkast_jax.sharding import (
    gather_groups,
    own_slices,
    packed_shardings,
    reduce_gradients,
    sharding_specs,
    state_shardings,
)
from topkast_jax.start import fan_in_normal, start
from topkast_jax.statistics import Tapped, Taps, observe, tap, taps
from topkast_jax.structure import (
    Structure,
    blocks,
    fan_in,
    groups_of,
    n_of_m,
    unstructured,
)
from topkast_jax.transformation import Sparse, plan


def __getattr__(name: str) -> Any:
    """`tk.flax`, on demand: the library itself does not need flax."""
    if name == "flax":
        return importlib.import_module("topkast_jax.flax")
    raise AttributeError(f"module 'topkast_jax' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "ALIASES",
    "METHODS",
    "Agreement",
    "Axes",
    "BlockMatrix",
    "Chosen",
    "Counts",
    "DropInState",
    "Found",
    "Grid",
    "Health",
    "Index",
    "Journal",
    "Leaf",
    "LeafMasks",
    "Masks",
    "Matched",
    "Method",
    "Mixture",
    "NonFinite",
    "Plan",
    "Sparse",
    "SparseState",
    "Store",
    "Structure",
    "Tapped",
    "Taps",
    "acdc",
    "at",
    "axes",
    "blocks",
    "by_path",
    "check",
    "choose",
    "convert",
    "cosine",
    "cubic",
    "deep_r",
    "delayed",
    "dense_masks",
    "drop_in",
    "dsr",
    "due",
    "erdos_renyi",
    "erk",
    "every",
    "export",
    "fan_in",
    "fan_in_normal",
    "first_due",
    "from_zeros",
    "gather_groups",
    "granet",
    "groups",
    "groups_of",
    "gse",
    "health",
    "kernels",
    "load_masks",
    "load_store",
    "magnitude",
    "mask_agreement",
    "masks",
    "matched_overlap",
    "meprop",
    "merge_groups",
    "mest",
    "metrics",
    "n_of_m",
    "observe",
    "of_masks",
    "one_shot",
    "ops",
    "own_slices",
    "packed_shardings",
    "plan",
    "probe",
    "probe_candidates",
    "probe_leaf",
    "random_k",
    "random_pruning",
    "reduce_gradients",
    "refresh",
    "rigl",
    "rigl_itop",
    "saliency",
    "save_masks",
    "set_",
    "shapes",
    "sharding_specs",
    "snfs",
    "snip",
    "sparse",
    "sparsify",
    "srigl",
    "start",
    "state_shardings",
    "static",
    "straight_through",
    "swat",
    "tap",
    "taps",
    "top_k",
    "top_k_tree",
    "top_kast",
    "uniform",
    "unstructured",
]
