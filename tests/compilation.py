"""Compiler options for tests that compile many small programs and run each briefly."""

from typing import Any

import jax
import jax.numpy as jnp


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
