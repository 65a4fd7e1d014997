"""The examples of the pages about methods run."""

import doctest
import pathlib

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = [
    *sorted(
        p
        for p in (DOCS / "methods").glob("*.md")
        if p.stem not in ("README", "layouts")
    ),
    DOCS / "migration_from_jaxpruner.md",
]


def test_there_are_pages():
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page):
    result = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert result.attempted > 0, f"{page.name} has no example"
    assert result.failed == 0
