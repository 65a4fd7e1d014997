"""A model from a config: the fields of a Flax module, checked before anything is built."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
OF_FLAX = {"parent", "name"}


def build(
    model: Callable[..., nn.Module],
    settings: Mapping[str, Any],
    also: Iterable[str] = (),
    **fixed: Any,
) -> nn.Module:
    """The module with these fields.

    Args:
      model: class of the module.
      settings: its fields, from `config.model`; `dtype` by name, lists for tuples.
      also: keys that are for somebody else, and left out.
      **fixed: fields that a config cannot set.
    Raises:
      ValueError: an unknown or missing field, or an unknown dtype.
    """
    fields: Any = getattr(model, "__dataclass_fields__")  # noqa: B009 not of a type
    taken = set(fields) - OF_FLAX - set(fixed)
    if unknown := sorted(set(settings) - taken - set(also)):
        raise ValueError(
            f"config.model has unknown keys {', '.join(unknown)}; "
            f"possible are {', '.join(sorted(taken | set(also)))}"
        )
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in settings.items()
        if key in taken
    }
    if isinstance(given.get("dtype"), str):
        if given["dtype"] not in DTYPES:
            raise ValueError(
                f"config.model.dtype is {given['dtype']!r}; possible are "
                f"{', '.join(DTYPES)}"
            )
        given["dtype"] = DTYPES[given["dtype"]]
    try:
        return model(**given, **fixed)
    except TypeError as error:  # a field that is missing
        raise ValueError(f"config.model: {error}") from error
