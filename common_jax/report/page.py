"""The report on a folder of runs: one HTML page with embedded pictures, readable offline."""

import base64
import contextlib
import dataclasses
import html
import logging
from collections.abc import Iterator, Sequence

from etils import epath

from common_jax.report.gather import FAMILIES, Family, Run, Shares, find_runs, read_run
from common_jax.report.pictures import read_drawn
from common_jax.workdir import write_bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and small pictures (the bytes of PNG files); every row is as long as the
    header."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | bytes, ...], ...]


def write_report(
    workdir: epath.PathLike,
    *,
    title: str,
    table: Table | None = None,
    tables: Sequence[Table] = (),
    figures: Sequence[tuple[str, epath.PathLike]] = (),
    families: Sequence[Family | Shares] = FAMILIES,
) -> epath.Path:
    """Writes `workdir/report.html` about every run in or below `workdir`, and each run's plots to
    its own `plots/curves.png`, unless they are newer than its metrics; returns the page's path. The
    same input files give the same bytes, and an unchanged page is not rewritten.

    Args:
      workdir: folder to search for folders with `metrics.jsonl`.
      title: the page's heading.
      table: the main results, shown first.
      tables: further tables, shown next, each in a section headed by its caption.
      figures: (caption, PNG file) of further pictures, shown below the tables.
      families: families of curves, see `common_jax.report.gather`.

    Raises:
      ValueError: for a run's file that cannot be read, naming it.
      OSError: if the page cannot be written; plots that cannot be written only log a warning.
    """
    workdir = epath.Path(workdir)
    sections = []  # (anchor, heading, HTML)
    if table is not None:
        sections.append(("table", "Results", _table_html(table)))
    for number, further in enumerate(tables):
        content = _table_html(dataclasses.replace(further, caption=""))
        sections.append((f"table-{number}", further.caption, content))
    if figures:
        images = [_image_html(epath.Path(png).read_bytes(), text, text) for text, png in figures]
        sections.append(("figures", "Comparison", "".join(images)))
    runs = find_runs(workdir)
    for number, run in enumerate(runs):
        name = workdir.name or "run" if run == workdir else str(run.relative_to(workdir))
        content = _run_html(read_run(run, families), name)
        sections.append((f"run-{number}", name, content))
    if not runs:
        sections.append(("runs", "No runs", "<p>No folder here holds metrics.jsonl.</p>"))
    contents, body = "", ""
    for anchor, heading, content in sections:
        folder, slash, name = heading.rpartition("/")
        heading = f"<small>{html.escape(folder + slash)}</small>{html.escape(name)}"
        contents += f'<li><a href="#{anchor}">{heading}</a></li>\n'
        body += f'<section id="{anchor}"><h2>{heading}</h2>\n{content}</section>\n'
    path = workdir / "report.html"
    page = PAGE.format(title=html.escape(title), style=STYLE, contents=contents, body=body)
    if not path.exists() or path.read_bytes() != page.encode():
        write_bytes(path, page.encode())
    return path


@contextlib.contextmanager
def dispensable(path: epath.PathLike) -> Iterator[None]:
    """A block that makes a report or a picture: a failure logs a warning that names `path`, and
    does not fail the run. A bug also shows its traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        logging.warning("%s could not be made (%s); the run itself is intact", path, error)
    except Exception:
        logging.warning("%s could not be made; the run itself is intact", path, exc_info=True)


def _run_html(run: Run, name: str) -> str:
    content = "".join(f"<span>{html.escape(fact)}</span>\n" for fact in run.facts)
    if run.panels:
        titles = ", ".join(panel.title for panel in run.panels)
        content += _image_html(_read_or_draw(run), f"{name}: {titles}", "")
    if run.config:
        table = Table("", ("key", "value"), tuple(run.config.items()))
        content += f"<details><summary>Config</summary>\n{_table_html(table)}</details>\n"
    return content


def _read_or_draw(run: Run) -> bytes:
    """The run's picture, redrawn if its curves have changed since, or the picture is broken."""
    path = run.folder / "plots" / "curves.png"
    if (picture := read_drawn(path, run.panels)) is not None:
        return picture
    from common_jax.report.draw import draw_panels  # matplotlib takes long to import

    picture = draw_panels(run.panels)
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, picture)
    except OSError as error:
        logging.warning("%s could not be written (%s)", path, error)
    return picture


def _table_html(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{x}</{tag}>" for x in cells) + "</tr>\n"

    # Not a <caption>, which is as wide as its table: a long one would be cut off or wrap narrowly.
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    body = row("th", [html.escape(x) for x in table.header])
    for number, cells in enumerate(table.rows, 1):
        contents = [
            _img(x, f"{name}, row {number}") if isinstance(x, bytes) else html.escape(x)
            for name, x in zip(table.header, cells, strict=True)
        ]
        body += row("td", contents)
    return f"<figure>{caption}<table>{body}</table></figure>\n"


def _image_html(png: bytes, alt: str, caption: str) -> str:
    return f"<figure>{_img(png, alt)}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _img(png: bytes, alt: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{html.escape(alt)}" src="{source}">'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #22252a; --faint: #676d76; --line: #dcdfe4 }
@media (prefers-color-scheme: dark) { img { filter: brightness(.9) }
  :root { --paper: #17191d; --ink: #e2e4e8; --faint: #9aa0aa; --line: #363a42 } }
body { margin: 0 auto; padding: 1.5rem; max-width: 96rem; font: 1rem/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink) } h1, h2 { margin: 0 0 .6rem; line-height: 1.2 }
h2 { font-size: 1.25rem } ul { list-style: none; margin: 0; padding: 0 } figure { margin: 1rem 0 }
a { color: inherit; text-decoration: none } img { max-width: 100%; background: #fff }
nav, small, figcaption, summary { font-size: .9rem; color: var(--faint) }
section { border-top: 1px solid var(--line); padding: 1.5rem 0 } span { margin-right: 1.4rem }
table { border-collapse: collapse; display: block; overflow-x: auto; text-align: left }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line) }
td img { height: 4rem; max-width: none; vertical-align: middle }
details table { font: .82rem monospace }
@media (min-width: 70rem) { body { display: grid; grid-template-columns: 14rem 1fr; gap: 0 2rem }
  main { min-width: 0 } nav { position: sticky; top: 1rem; max-height: 96vh; overflow: auto } }"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body><nav><ul>{contents}</ul></nav><main><h1>{title}</h1>{body}</main></body></html>
"""
