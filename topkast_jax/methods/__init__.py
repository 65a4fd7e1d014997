"""One paper a file; `METHODS` finds a method by the name that a config gives it."""

from collections.abc import Callable

from topkast_jax._types import Method
from topkast_jax.methods.drop_grow import rigl, set_
from topkast_jax.methods.gse import gse
from topkast_jax.methods.static import static
from topkast_jax.methods.top_kast import top_kast

METHODS: dict[str, Callable[..., Method]] = {
    "top_kast": top_kast,
    "static": static,
    "set": set_,
    "rigl": rigl,
    "gse": gse,
}
