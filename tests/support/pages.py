"""Reads the project's Markdown pages: their fenced blocks, commands, links and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PATHS = [*ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in _PATHS))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!-- runs: (\S+?)::(\w+) -->\s*\Z")
_INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:[\w./]+/)?(?:python3?|make|pip|pytest) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``runner``: (test file, function) named by a ``<!-- runs: FILE::FUNCTION -->`` before it."""

    page: str
    line: int
    kind: str
    code: str
    runner: tuple[str, str] | None

    def __str__(self):
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """Returns the fenced blocks in the order of the page. ``text``: text to read in place of the page's."""
    text = text_of(page) if text is None else text
    found = []
    for match in _FENCE.finditer(text):
        marker = _MARKER.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[1], match[2], marker and (marker[1], marker[2])))
    return found


def prose_of(page: str) -> str:
    """Returns the page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def commands_of(page: str) -> list[str]:
    """Returns every shell command: the lines of the sh blocks, and commands in running text."""
    lines = [line for block in blocks_of(page) if block.kind == "sh" for line in block.code.splitlines()]
    return [line for line in lines if line and not line.startswith("#")] + _INLINE.findall(prose_of(page))


def links_of(page: str) -> list[str]:
    """Returns the targets of links and pictures, without those on other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose_of(page)))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors_of(page: str) -> set[str]:
    """Returns the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
