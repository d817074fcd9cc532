"""Writes a report as Markdown, CSV files and one HTML page that needs no other file."""

import base64
import csv
import html
import re
from collections.abc import Sequence
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
p.note { color: #555; font-size: 13px; }
"""


class Page:
    """Holds blocks in order. In cells ``**x**`` is bold, as in Markdown."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self._markdown: list[str] = [f"# {title}"]
        self._html: list[str] = [f"<h1>{html.escape(title)}</h1>"]
        folder.mkdir(parents=True, exist_ok=True)

    def heading(self, text: str) -> None:
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Adds a caption or a note."""
        self._markdown.append(text)
        self._html.append(f'<p class="note">{_inline(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table of strings; the first column is text, the others are figures."""
        ruler = ["---", *["---:"] * (len(header) - 1)]
        self._markdown.append("\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)))
        line = lambda cells, tag: "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells)
        body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
        self._html.append(f'<div class="table"><table>{head}<tbody>\n{body}\n</tbody></table></div>')

    def csv(self, name: str, rows: Sequence[dict]) -> None:
        """Writes ``name``.csv beside the page, numbers unrounded, and adds a link to it in the Markdown."""
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
        self._markdown.append(f"[{name}.csv]({name}.csv)")

    def figure(self, name: str, caption: str) -> None:
        """Adds the PNG called ``name`` in the folder."""
        self._markdown.append(f"![{caption}]({name})")
        data = base64.b64encode((self.folder / name).read_bytes()).decode()
        text = html.escape(caption)
        self._html.append(f'<p><img alt="{text}" src="data:image/png;base64,{data}"></p><p class="note">{text}</p>')

    def write(self) -> None:
        """Writes report.md and report.html."""
        (self.folder / "report.md").write_text("\n\n".join(self._markdown) + "\n", encoding="utf-8")
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        body = "\n".join(self._html)
        page = f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
        (self.folder / "report.html").write_text(page, encoding="utf-8")


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
