"""Parsing of a config's argument string, shared by every config file."""

from typing import Any

TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def parse(arg: str, **defaults: Any) -> dict[str, Any]:
    """Reads `"method=rigl,forward=0.95,smoke"` over defaults.

    Args:
      arg: comma separated `key=value`; a bare `key` means `key=True`.
      **defaults: every key there is, with its default. A value takes the type of its
        default; the default None stands for "not given" and takes a float.
    Returns:
      The defaults, with the given values in their place.
    Raises:
      ValueError: a key that is not there, or a value of another type.
    """
    found = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise ValueError(
                f"config argument {key!r} is unknown; there are {', '.join(defaults)}"
            )
        found[key] = _read(key, text if equals else "true", defaults[key])
    return found


def _read(key: str, text: str, default: Any) -> Any:
    kind = float if default is None else type(default)
    if kind is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind is not bool:
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"config argument {key}={text!r} is not of type {kind.__name__}")
