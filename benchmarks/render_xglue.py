"""The committed runs of benchmarks/xglue as two short tables: every method against SFT, and the paper's claims."""

from pathlib import Path

from markdown_table import markdown

NAME = "xglue"


def section(results: Path) -> str:
    """What belongs between the markers. results: the folder of the other benchmarks' results."""
    folder = results / "xglue"
    if not any(folder.glob("*/*/*.json")):
        return "\n*No results yet.*\n\n"
    from xglue.collect import collect  # only here: they load torch
    from xglue.report import caption, data_name

    parts = []
    for group in collect(folder):
        parts += [f"*{data_name(group)}. {caption(group)}*", _methods(group), _claims(group)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def _methods(group) -> str:
    from xglue import statistics
    from xglue.report import against_sft, holm_adjusted, marked, ranks
    from xglue.titles import MISSING, TITLES

    columns = ["en", "avg", "zero"]
    means = {
        column: {method: statistics.mean(list(runs.scores(column).values())) for method, runs in group.runs.items()}
        for column in columns
    }
    marks = {column: ranks(own) for column, own in means.items()}
    tests = against_sft(group, "avg")
    adjusted = holm_adjusted(tests)
    rows = []
    for method, runs in group.runs.items():
        scores = [marked(f"{means[column][method]:.2f}", marks[column][method]) for column in columns]
        test = tests.get(method)
        difference = [MISSING, MISSING]
        if test is not None and test.low is not None:
            difference = [f"{test.difference:+.2f} ({test.low:+.2f} to {test.high:+.2f})", f"{adjusted[method]:.2f}"]
        rows.append([TITLES[method], f"{runs.lr:g}", str(len(runs.results)), *scores, *difference])
    header = ["method", "lr", "seeds", "English", "all languages", "zero-shot", "minus SFT, all (95 %)", "p, Holm"]
    return markdown(header, rows)


def _claims(group) -> str:
    from xglue.paper_claims import table

    return markdown(*table(group))
