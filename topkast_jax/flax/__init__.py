"""Sparse products inside unmodified Flax models, of Linen and of NNX (`tk.flax.nnx`).

The only room of the library that imports flax; `import topkast_jax.flax` asks for it.
"""

from topkast_jax.flax import linen, nnx
from topkast_jax.flax.activations import meprop, swat
from topkast_jax.flax.linen import apply, routes

__all__ = ["apply", "linen", "meprop", "nnx", "routes", "swat"]
