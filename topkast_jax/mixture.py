"""Different methods in one model: ordered rules over the paths of parameters."""

from collections.abc import Sequence
from typing import Any

from topkast_jax._types import Method, Mixture


def groups(rules: Sequence[tuple[Any, Any]]) -> Mixture:
    """Chooses the method of every parameter by its path; the first match wins.

    Each method has sparsities, schedules, structure and distribution of its own, and
    its `where` still says which of its parameters are sparse. A distribution shares the
    sparsity out among the parameters of its rule.

    Args:
      rules: pairs of a pattern (a glob or a compiled regex) and a method, or None to
        keep parameters dense. They must cover every parameter.
    Returns:
      What `tk.sparse` takes in place of a method.
    Raises:
      ValueError: no rules, nothing but dense ones, or something that is no method.
        `init` raises where a pattern matches nothing, a rule is never reached, or a
        parameter is not covered.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> rules = groups([
      ...     ("head/*", None),
      ...     ("attention/*", tk.rigl(0.5)),
      ...     ("*", tk.top_kast(0.9, 0.8)),
      ... ])
      >>> params = {
      ...     name: {"kernel": jnp.ones((10, 10))} for name in ("attention", "body", "head")
      ... }
      >>> tx = tk.sparse(optax.adam(0.1), rules)
      >>> masks = tk.masks(tx.init(params))
      >>> {name: int(m["kernel"].sum()) for name, m in masks.forward.items() if m["kernel"] is not None}
      {'attention': 50, 'body': 10}
    """
    listed = tuple((pattern, method) for pattern, method in rules)
    if not any(method for _, method in listed):
        raise ValueError(
            "tk.groups: no rule names a method, so nothing would be sparse"
        )
    for pattern, method in listed:
        if method is not None and not isinstance(method, Method):
            raise ValueError(
                f"tk.groups: the rule for {pattern!r} has {method!r}, which is no method: "
                "say tk.top_kast(...) or another, or None for dense"
            )
    return Mixture(listed)
