"""Which method runs with which structure in which layout: docs/methods/layouts.md.

    PYTHONPATH=tests:tests/conformance python tests/conformance/test_table.py

writes the page; the slow test compares it with what the library does.
"""

import pathlib
from typing import Any

import battery
import jax
import jax.numpy as jnp
import optax
import pytest

import topkast_jax as tk

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods" / "layouts.md"
STRUCTURES = {
    "entries": tk.unstructured,
    "blocks": tk.blocks(2, 4),
    "fan-in": tk.fan_in(),
    "fan-in of blocks": tk.fan_in(2, 4),
    "N:M": tk.n_of_m(4),
    "channels": tk.blocks(10**9, 1),
    "groups": tk.groups_of(2),
}
LAYOUTS = ("masked", "packed", "block")
HEAD = """# Method, structure, layout

What runs, and what is refused before any training. Written by
`tests/conformance/test_table.py`, which asks the library; m is masked, p packed, b block.
"channels" are blocks as high as the kernel, so whole outputs live or die together. What
is crossed out is refused, with the words below.

"""


def refusal(name: str, structure: tk.Structure, layout: str) -> str:
    """What is said of a combination; "" where it starts."""
    try:
        method = battery.METHODS[name](
            refresh=tk.every(battery.EVERY), where=tk.kernels, structure=structure
        )
        tx = tk.sparse(
            optax.sgd(0.1), method, layout=layout, learning_rate=battery.RATE
        )
        params = {"kernel": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
        if layout == "masked":
            jax.eval_shape(tx.init, params)
        else:
            tk.start(tx, {"kernel": jnp.ones((16, 16))})
    except ValueError as error:
        return str(error)
    return ""


def cell(name: str, structure: tk.Structure, said: dict[str, int]) -> str:
    """Layouts that run, and a number for what is said of each other one."""
    words = []
    for layout in LAYOUTS:
        error = refusal(name, structure, layout)
        letter = layout[0]
        if error:
            for own, any_ in (
                (f"layout={layout!r}: ", ""),
                (f"tk.{name}", "this method"),
                (f"{name} ", "this method "),
                (structure.name, "this structure"),
            ):
                error = error.replace(own, any_)
            letter = f"~~{letter}~~<sup>{said.setdefault(error, len(said) + 1)}</sup>"
        words.append(letter)
    return " ".join(words)


def page() -> str:
    """The whole page."""
    said: dict[str, int] = {}
    lines = [["method", *STRUCTURES], ["---"] * (1 + len(STRUCTURES))]
    for name in tk.METHODS:
        cells = [cell(name, structure, said) for structure in STRUCTURES.values()]
        lines.append([name, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"{number}. {error}" for error, number in said.items())
    return f"{HEAD}{table}\n\n{notes}\n"


@pytest.mark.slow
def test_the_page_says_what_the_library_does() -> None:
    assert PAGE.read_text() == page()


@pytest.mark.parametrize(
    ("name", "structure", "layout", "said"),
    [
        ("top_kast", "blocks", "block", ""),
        ("set", "N:M", "packed", ""),
        ("magnitude", "channels", "masked", ""),
        ("magnitude", "entries", "packed", "packed arrays have one size"),
        ("snfs", "entries", "block", "packed arrays have one size"),
    ],
)
def test_some_of_it(name: str, structure: Any, layout: str, said: str) -> None:
    found = refusal(name, STRUCTURES[structure], layout)
    assert said in found and bool(found) == bool(said)
    row = next(x for x in PAGE.read_text().splitlines() if x.startswith(f"| {name} |"))
    words = row.split("|")[2 + list(STRUCTURES).index(structure)].split()
    assert words[LAYOUTS.index(layout)].startswith("~~") == bool(said)


if __name__ == "__main__":
    PAGE.write_text(page())
