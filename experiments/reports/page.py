"""The page of a report: one HTML file with everything in it."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reports.pictures import Picture
from experiments.reports.tables import Rows

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --muted: #5c6570; --line: #dfe3e8;
  --ground: #ffffff; --card: #f6f8fa; --link: #2f6db5; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ea; --muted: #98a2ad;
  --line: #363d46; --ground: #16191d; --card: #20252b; --link: #7fb0ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; color: var(--ink);
  background: var(--ground); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0;
  padding: 0; list-style: none; }
figure { margin: 0 0 1.5rem; }
figcaption { color: var(--muted); font-size: .92rem; max-width: 50rem; margin-top: .5rem; }
.wide { overflow-x: auto; }
figure img { display: block; width: auto; max-width: 100%; height: auto;
  background: white; border: 1px solid var(--line); border-radius: 8px; }
@media (max-width: 50rem) { figure img { max-width: none; width: 46rem; } }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child { text-align: left; }
.text td, .text th { text-align: left; }
th.long { min-width: 8rem; }
tbody tr:hover { background: var(--card); }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--link); }
pre { background: var(--card); padding: 1rem; overflow-x: auto; border-radius: 8px;
  font-size: .82rem; }
.note { color: var(--muted); font-size: .92rem; }
"""


def page(
    title: str,
    summary: Sequence[str],
    results: Rows,
    notes: Sequence[str],
    costs: Sequence[Picture],
    changes: Sequence[Picture],
    differences: Rows,
    common: Mapping[str, Any],
    provenance: Rows,
    left_out: Mapping[str, str],
) -> str:
    """The whole file; nothing in it comes from elsewhere.

    Args:
      title: of the page.
      summary: sentences at the top.
      results: see `tables.results`.
      notes: sentences under it.
      costs: pictures of what a metric costs.
      changes: pictures of what happened on the way.
      differences: see `tables.differences`.
      common: what all configs share.
      provenance: see `tables.provenance`.
      left_out: `{folder: why}` of runs that are not shown.
    """
    shared = json.dumps(common, indent=1)
    sections = [
        ("results", "Results", _table(results) + _paragraphs(notes, "note")),
        ("cost", "What it costs", "".join(map(_figure, costs))),
        ("way", "On the way", "".join(map(_figure, changes))),
        (
            "configs",
            "What differs",
            _table(differences, "text")
            + "<details><summary>What all configs share</summary>"
            f"<pre>{html.escape(shared)}</pre></details>",
        ),
        ("provenance", "Where it comes from", _table(provenance, "text")),
    ]
    if left_out:
        items = "".join(
            f"<li><code>{html.escape(run)}</code>: {html.escape(why)}</li>"
            for run, why in left_out.items()
        )
        sections.append(("left-out", "Left out", f"<ul>{items}</ul>"))
    links = "".join(f'<li><a href="#{i}">{name}</a></li>' for i, name, _ in sections)
    body = "".join(
        f'<section id="{i}"><h2>{name}</h2>{text}</section>\n'
        for i, name, text in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No icon: a browser would ask for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>{_paragraphs(summary)}"
        f"<nav><ul>{links}</ul></nav></header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _paragraphs(sentences: Sequence[str], kind: str = "") -> str:
    given = f' class="{kind}"' if kind else ""
    return "".join(f"<p{given}>{html.escape(text)}</p>" for text in sentences)


def _table(rows: Rows, kind: str = "") -> str:
    head, *body = rows
    cells = "".join(
        f'<th scope="col"{" class=long" if len(text) > 20 else ""}>{html.escape(text)}</th>'
        for text in head
    )
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>\n"
        for row in body
    )
    # Reached by the keyboard, since it may have to be scrolled.
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{cells}</tr>'
        f"</thead>\n<tbody>\n{lines}</tbody></table></div>"
    )


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    heading = f"<h3>{html.escape(picture.title)}</h3>"
    if picture.png is None:
        return f'{heading}<p class="note">{caption}</p>'
    data = base64.b64encode(picture.png).decode()
    return (
        f'{heading}<figure id="{picture.name}"><div class="wide" tabindex="0">'
        f'<img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )
