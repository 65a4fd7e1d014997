"""Compiler options for tests of many small programs, and what a program holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fast_compilation() -> dict[str, Any]:
    """Options that save time in LLVM, nearly all of what such tests take.

    They change nothing about how programs are split over devices. Options belong to a
    version of XLA; those that this one does not know are left out.
    """
    wanted = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    known = {}
    for name, value in wanted.items():
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options={name: value})()
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


def sizes_in(text: str) -> set[int]:
    """Sizes of all arrays in a compiled program."""
    found = set()
    for piece in text.split("[")[1:]:
        sides = piece.split("]")[0].split(",")
        if all(side.isdecimal() for side in sides):
            found.add(int(np.prod([int(side) for side in sides])))
    return found
