"""The parts of a report, and their three forms: a terminal's, Markdown, and one HTML file that loads nothing.

A report is a list of parts, such as comparison_page.py makes. Whatever text they hold, a model's included, stays text.
"""

from __future__ import annotations

import textwrap
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mipfast.experiment.figures import write_figure
from mipfast.files import check_folder, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --paper: #fff; --band: #f3f4f6; --line: #c9ccd1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #b3b7bd; --paper: #16181b; --band: #23262b; --line: #454a52; }
}
body { max-width: 72rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
body { color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h3 { margin: 1.5rem 0 0; font-size: 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.3rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; background: /* a shade where there is more to scroll to */
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / .8rem 100% no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; max-width: 16rem; background: var(--paper); }
thead th { vertical-align: bottom; }
tr.before > * { background: var(--band); }
.words { text-align: left; white-space: normal; min-width: 7rem; }
small, .note { color: var(--soft); font-size: .85rem; font-weight: 400; }
img { display: block; width: 100%; min-width: 42rem; padding: .5rem; box-sizing: border-box; background: #fff; }
pre { padding: .7rem; background: var(--band); font-size: .85rem; white-space: pre-wrap; unicode-bidi: plaintext; }
summary { cursor: pointer; padding: .3rem 0; }
@media (max-width: 40rem) {
  table { font-size: .85rem; }
  th, td { padding: .3rem .5rem; }
  th:first-child { max-width: 6rem; overflow-wrap: anywhere; }
}
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Grid:
    """A table. A line break in a cell begins its small print. The first `before` rows are set off from the others;
    columns are numbers but for the first and those in `words`."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    before: int = 0
    note: str = ""
    words: Sequence[str] = ()

    @property
    def is_words(self) -> list[bool]:
        return [i == 0 or head in self.words for i, head in enumerate(self.heads)]


@dataclass(frozen=True)
class Plot:
    name: str
    alt: str
    draw: Callable[[], Figure] = field(repr=False)


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Verbatim:
    text: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown on demand; no pictures."""

    summary: str
    parts: Sequence[Part]


Part: TypeAlias = Heading | Grid | Plot | Bullets | Verbatim | Fold | str  # a str is a paragraph


def plain(text: object) -> str:
    """The text without control characters and halves of surrogate pairs, which belong into no page or terminal."""
    whole = str(text).encode("utf-8", "replace").decode().replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\ufffd" for c in whole)


def line(text: object) -> str:
    return plain(text).replace("\n", " ")


def terminal(parts: Iterable[Part]) -> Group:
    """The tables and lists that are not folded away, in the console's width."""
    shown: list[Table | Text] = []
    for part in parts:
        if isinstance(part, Grid):
            shown.append(_table(part))
        elif isinstance(part, Bullets):
            shown += [Text(f"- {item}") for item in part.items]
    return Group(*shown)


def _table(grid: Grid) -> Table:
    title, caption = Text(grid.title), Text(grid.note)
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    whole = all(len(row[0]) <= 12 for row in grid.rows)  # a short name stays on one line, however narrow the console
    for i, (head, is_words) in enumerate(zip(grid.heads, grid.is_words, strict=True)):
        justify: Literal["left", "right"] = "left" if is_words else "right"
        table.add_column(Text(head), justify=justify, overflow="fold", no_wrap=i == 0 and whole)
    for i, row in enumerate(grid.rows):
        # Text, not str: a bracket in a name is no markup
        table.add_row(*map(Text, row), end_section=i + 1 == grid.before)
    return table


def markdown(parts: Iterable[Part]) -> str:
    return "\n".join(map(_markdown, parts))


def _markdown(part: Part) -> str:
    match part:
        case Heading(text):
            return f"## {_md(text)}\n"
        case Grid(title, heads, rows, note=note):
            rule = "|".join("---" if is_words else "---:" for is_words in part.is_words)
            table = [f"| {' | '.join(map(_md, row))} |" for row in (heads, *rows)]
            small = [_md(note), ""] if note else []
            return "\n".join([f"### {_md(title)}", "", table[0], f"|{rule}|", *table[1:], "", *small])
        case Plot(name, alt):
            return f"![{_md(alt)}](pictures/{name})\n"
        case Bullets(items):
            return "".join(f"- {_md(item)}\n" for item in items)
        case Verbatim(text):
            return textwrap.indent(text, "    ", lambda line: True) + "\n"
        case Fold(summary, parts):
            return f"<details><summary>{escape(summary)}</summary>\n\n{markdown(parts)}\n</details>\n"
        case str(text):
            return f"{_md(text)}\n"


def _md(text: str) -> str:
    """What Markdown, or HTML in it, would take for markup is escaped; a line break becomes <br>."""
    return "".join(f"\\{c}" if c in "\\`*[]|#~" else escape(c, quote=False) for c in text).replace("\n", "<br>")


def html(title: str, parts: Iterable[Part], folder: Path) -> str:
    """A whole file, with the pictures that `write` puts into the folder."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_body(parts, folder)}
</body>
</html>
"""


def _body(parts: Iterable[Part], folder: Path) -> str:
    return "\n".join(_html(part, folder) for part in parts)


def _html(part: Part, folder: Path) -> str:
    match part:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Grid(title, heads, rows, before, note):
            classes = [' class="words"' if is_words else "" for is_words in part.is_words]
            lines = [f"<thead><tr>{_row(heads, classes, 'col')}</tr></thead>", "<tbody>"]
            for i, row in enumerate(rows):
                kind = ' class="before"' if i < before else ""
                lines.append(f"<tr{kind}>{_row(row, classes, 'row')}</tr>")
            shown = "\n".join([f"<h3>{escape(title)}</h3>", _wide(title, ["<table>", *lines, "</tbody></table>"])])
            return shown + (f'\n<p class="note">{escape(note)}</p>' if note else "")
        case Plot(name, alt):
            data = b64encode((folder / "pictures" / name).read_bytes()).decode()
            return _wide(name, [f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'])
        case Bullets(items):
            return "\n".join(["<ul>", *(f"<li>{escape(item)}</li>" for item in items), "</ul>"])
        case Verbatim(text):
            return f"<pre>{escape(text)}</pre>"
        case Fold(summary, parts):
            return f"<details><summary>{escape(summary)}</summary>\n{_body(parts, folder)}\n</details>"
        case str(text):
            return f"<p>{escape(text)}</p>"


def _wide(label: str, lines: Sequence[str]) -> str:
    """What is wider than a phone scrolls by itself, by keyboard too."""
    return "\n".join([f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0">', *lines, "</div>"])


def _row(cells: Sequence[str], classes: Sequence[str], scope: str) -> str:
    """A head row where scope is col; of others, the first cell is a head."""
    tags = []
    for i, (cell, its_class) in enumerate(zip(cells, classes, strict=True)):
        tag, its_scope = ("th", f' scope="{scope}"') if i == 0 or scope == "col" else ("td", "")
        first, *small = map(escape, cell.split("\n"))
        rest = "".join(f"<br><small>{text}</small>" for text in small)
        tags.append(f"<{tag}{its_scope}{its_class}>{first}{rest}</{tag}>")
    return "".join(tags)


def write(folder: Path, title: str, parts: Sequence[Part], name: str = "report.md") -> Path:
    """Write name with pictures/*.png, and report.html, which holds everything; returns the path of report.html.

    Raises MipfastError without matplotlib, ArtefactError where folder is a file."""
    check_folder(folder)
    for part in parts:
        if isinstance(part, Plot):
            write_figure(folder / "pictures" / part.name, part.draw())
    texts = {name: f"# {_md(title)}\n\n{markdown(parts)}", "report.html": html(title, parts, folder)}
    for file, text in texts.items():
        write_atomic(folder / file, partial(Path.write_text, data=text, encoding="utf-8"))
    return folder / "report.html"
