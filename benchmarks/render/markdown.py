"""Formats Markdown tables and numbers."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Formats a table of strings. The first column is text, the others are figures."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
