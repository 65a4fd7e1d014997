"""One paper a file; `METHODS` finds a method by the name that a config gives it."""

from collections.abc import Callable

from topkast_jax._types import Method
from topkast_jax.methods.acdc import acdc
from topkast_jax.methods.deep_r import deep_r
from topkast_jax.methods.delayed import delayed as delayed
from topkast_jax.methods.drop_grow import rigl, rigl_itop, set_
from topkast_jax.methods.dsr import dsr
from topkast_jax.methods.granet import granet
from topkast_jax.methods.gse import gse
from topkast_jax.methods.mest import mest
from topkast_jax.methods.once import one_shot, snip
from topkast_jax.methods.pruning import magnitude, random_pruning, saliency
from topkast_jax.methods.snfs import snfs
from topkast_jax.methods.srigl import srigl
from topkast_jax.methods.static import static
from topkast_jax.methods.straight_through import straight_through
from topkast_jax.methods.top_kast import top_kast

METHODS: dict[str, Callable[..., Method]] = {
    "top_kast": top_kast,
    "static": static,
    "set": set_,
    "rigl": rigl,
    "magnitude": magnitude,
    "saliency": saliency,
    "random_pruning": random_pruning,
    "one_shot": one_shot,
    "snip": snip,
    "straight_through": straight_through,
    "acdc": acdc,
    "granet": granet,
    "rigl_itop": rigl_itop,
    "snfs": snfs,
    "mest": mest,
    "srigl": srigl,
    "dsr": dsr,
    "deep_r": deep_r,
    "gse": gse,
}

ALIASES = {"rigl_itop": "rigl"}
"""Methods that choose the masks of another, given the same numbers and schedule."""
