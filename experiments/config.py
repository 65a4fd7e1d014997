"""Reading a config strictly: a key that nothing reads is an error.

`Watched` is a read-only view that remembers what was read. When everything has been
built from it, `require_all_read` names what nothing asked for, so a misspelt key is
found before training and not after.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Mapping[str, Any] | ConfigDict


class MissingKey(AttributeError, KeyError, ValueError):
    """The config lacks a key: to hasattr an attribute, to the user a bad value."""

    __str__ = Exception.__str__  # KeyError would quote it


class Watched(Mapping[str, Any]):
    """Read-only view of a config which remembers the keys that were read.

    Args:
      config: a ConfigDict, or any mapping with string keys.
      prefix: dotted path of this view in the whole config.
    """

    def __init__(self, config: Config, prefix: str = "") -> None:
        self._prefix = prefix
        self._read: set[str] = set()
        items: Any = config.items()
        self._values = {
            key: Watched(value, f"{prefix}{key}.") if _is_mapping(value) else value
            for key, value in items
        }

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            whole = f"config.{self._prefix}".rstrip(".")
            raise MissingKey(
                f"config.{self._prefix}{key} is missing; {whole} has "
                f"{', '.join(self._values) or 'no keys'}"
            )
        self._read.add(key)
        return self._values[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # copy and pickle ask before __init__ has run
            raise AttributeError(key)
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to_dict(self) -> dict[str, Any]:
        """All of it, which counts as read."""
        return {
            key: value.to_dict() if isinstance(value, Watched) else value
            for key, value in self.items()
        }

    def unread(self) -> list[str]:
        """Dotted paths of the leaves that nothing has read."""
        found = []
        for key, value in self._values.items():
            if isinstance(value, Watched) and (key in self._read or not len(value)):
                found += value.unread()
            elif key not in self._read:
                found.append(self._prefix + key)
        return found

    def known(self) -> list[str]:
        """Dotted paths of everything that was read."""
        found = []
        for key in self._read:
            value = self._values[key]
            found += value.known() if isinstance(value, Watched) else []
            found.append(self._prefix + key)
        return found


def _is_mapping(value: Any) -> bool:
    # A ConfigDict is no registered Mapping, so it is known by what it offers.
    return hasattr(value, "items") and hasattr(value, "keys")


def require_all_read(config: Watched) -> None:
    """Raises ValueError naming the keys that nothing reads, and their neighbours."""
    unread = config.unread()
    if not unread:
        return
    known = config.known()
    names = []
    for path in unread:
        near = difflib.get_close_matches(path, known, n=1)
        names.append(f"config.{path}" + (f" (did you mean {near[0]}?)" if near else ""))
    raise ValueError(f"nothing reads {', '.join(names)}; remove it or correct its name")


def as_json(config: Config) -> dict[str, Any]:
    """A config as plain JSON data: tuples become lists, keys keep their order."""
    tree = Watched(config).to_dict()
    return json.loads(json.dumps(tree, sort_keys=True))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dotted.path": leaf}` of nested mappings; an empty one is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(
    saved: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """`{"dotted.path": (saved, given)}` where two JSON configs differ.

    A key that only one of them has reads as "absent" in the other.
    """
    one, two = flatten(saved), flatten(given)
    return {
        path: (one.get(path, "absent"), two.get(path, "absent"))
        for path in sorted(one.keys() | two.keys())
        if one.get(path, "absent") != two.get(path, "absent")
    }


def require(
    config: Watched, least: Mapping[str, int], choices: Mapping[str, Any]
) -> None:
    """Checks plain values of a config.

    Args:
      config: the whole config.
      least: the smallest integer allowed, by key.
      choices: the values allowed, by key.
    Raises:
      ValueError: the first value that is not allowed.
    """
    for key, low in least.items():
        value = config[key]
        if not isinstance(value, int) or value < low:
            raise ValueError(
                f"config.{key}={value!r} must be an integer of at least {low}"
            )
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ValueError(f"config.{key}={config[key]!r} must be one of {allowed}")
