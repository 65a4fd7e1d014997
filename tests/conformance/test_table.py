"""Which method runs with which structure in which layout: docs/methods/layouts.md.

    PYTHONPATH=tests:tests/conformance python tests/conformance/test_table.py

writes the page; a test compares each row with what the library does.
"""

import dataclasses
import pathlib
import re
import traceback
from typing import Any

import battery
import jax
import jax.numpy as jnp
import numpy as np
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
LIBRARY = pathlib.Path(tk.__file__).parent
HEAD = """# Method, structure, layout

What runs, and what is refused before any training. Written by
`tests/conformance/test_table.py`, which asks the library to start, to update and to refresh;
m is masked, p packed, b block.
"channels" are blocks as high as the kernel, so whole outputs live or die together. What
is crossed out is refused, with the words below.

"""


VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude(scope='global')": dict(scope="global"),
    "one_shot(at=0)": dict(at=0),
    "snip(scope='global')": dict(scope="global"),
    "straight_through(soft=True)": dict(soft=True),
    "acdc(scope='global')": dict(scope="global"),
    "granet(scope='global')": dict(scope="global"),
    "snfs(redistribute=False)": dict(redistribute=False),
    "mest(soft=True)": dict(soft=True),
    "srigl(gamma_sal=0)": dict(gamma_sal=0.0),
    "deep_r(scope='leaf')": dict(scope="leaf"),
    "gse(scope='global')": dict(scope="global"),
}
"""Rows of their own: what is said of these differs."""
ROWS = sorted(
    [*tk.METHODS, *VARIANTS],
    key=lambda row: list(tk.METHODS).index(row.partition("(")[0]),
)
SHAPE = (16, 16)


def made(row: str, structure: tk.Structure) -> tk.Method:
    """The battery's method, with what the row says in place of what the battery does."""
    name, changed = row.partition("(")[0], VARIANTS.get(row, {})

    def called(*args: Any, **options: Any) -> tk.Method:
        return tk.METHODS[name](*args, **options | changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, tk.METHODS[name].__name__, called)
        return battery.METHODS[name](
            refresh=tk.every(battery.EVERY), where=tk.kernels, structure=structure
        )


def loss(theta: Any, state: Any) -> jax.Array:
    alpha = tk.sparsify(theta, tk.masks(state), expanded=True)
    return jnp.sum(alpha["kernel"] ** 2)


def refusal(row: str, structure: tk.Structure, layout: str) -> str:
    """What is said of a combination; "" where it starts, updates and refreshes."""
    try:
        tx = tk.sparse(
            optax.sgd(0.1, momentum=0.9),
            made(row, structure),
            layout=layout,
            learning_rate=battery.RATE,
        )
        params = {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
        if layout == "masked":
            state = jax.eval_shape(tx.init, params)
            jax.eval_shape(tx.update, params, state, params)
            return ""
        theta, state, store = tk.start(tx, {"kernel": jnp.ones(SHAPE)})
        jax.eval_shape(tx.update, theta, state, theta)
        method, found = made(row, structure), None
        if method.due is None:
            return ""
        if method.probe:
            found = {"kernel": probed(theta, state)}
        elif method.needs_gradient:
            found = {"kernel": tk.Found(None, None, theta["kernel"])}
        tk.refresh(tx, theta, state, store, found)
    except ValueError as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        assert LIBRARY in pathlib.Path(raised).parents, "no refusal, but a fault"
        return str(error)
    return ""


def probed(theta: Any, state: Any) -> tk.Found:
    """A `tk.probe` that is traced and not compiled: all that it would see is zero."""
    index = tk.masks(state).forward["kernel"]
    if tk.masks(state).probe["kernel"] is not None:
        shapes = jax.eval_shape(
            lambda *given: tk.probe_candidates(loss, *given, ()), theta, state
        )["kernel"]
    else:
        shapes = jax.eval_shape(
            lambda *given: tk.probe_leaf(loss, 0, *given, ()),
            theta, state, index, jax.random.key(0),
        )  # fmt: skip
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    absent = np.ones((index.grid.whole[0], index.grid.count), bool)
    np.put_along_axis(
        absent, np.asarray(index.index).reshape(len(absent), -1), False, 1
    )
    some = [np.flatnonzero(row)[: zeros.index.shape[-1]] for row in absent]
    return dataclasses.replace(zeros, index=np.asarray(some, np.int32))


def cell(row: str, structure: tk.Structure, said: dict[str, int]) -> str:
    """Layouts that run, and a number for what is said of each other one."""
    words, name = [], row.partition("(")[0]
    for layout in LAYOUTS:
        error = refusal(row, structure, layout)
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


def line(row: str, said: dict[str, int]) -> str:
    """A row of the table."""
    cells = [cell(row, structure, said) for structure in STRUCTURES.values()]
    return f"| {' | '.join([row, *cells])} |"


def page() -> str:
    """The whole page."""
    said: dict[str, int] = {}
    head = [
        f"| {' | '.join(words)} |"
        for words in (["method", *STRUCTURES], ["---"] * (1 + len(STRUCTURES)))
    ]
    table = "\n".join([*head, *(line(row, said) for row in ROWS)])
    notes = "\n".join(f"{number}. {error}" for error, number in said.items())
    return f"{HEAD}{table}\n\n{notes}\n"


def notes() -> dict[str, int]:
    """The numbered lines of the page."""
    found = re.findall(r"^(\d+)\. (.*)$", PAGE.read_text(), re.MULTILINE)
    return {error: int(number) for number, error in found}


@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_the_library_does(row: str) -> None:
    assert line(row, notes()) in PAGE.read_text().splitlines()


def test_the_page_says_nothing_else() -> None:
    text = PAGE.read_text()
    found = [x.split(" | ")[0] for x in text.splitlines() if x[:2] == "| "]
    assert found == ["| method", "| ---", *(f"| {row}" for row in ROWS)]
    assert text.startswith(HEAD)
    cited = dict.fromkeys(re.findall(r"<sup>(\d+)</sup>", text))  # in their order
    assert list(map(int, cited)) == list(notes().values())


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
