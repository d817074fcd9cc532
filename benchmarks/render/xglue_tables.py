"""The committed runs of benchmarks/xglue as short tables: what was run, every method's score, the paper's claims."""

from pathlib import Path

from .markdown import markdown

NAME = "xglue"


def section(results: Path) -> str:
    """Returns the text between the markers. ``results``: the folder of the other benchmarks' results."""
    folder = results / "xglue"
    from ..xglue.report.collect import collect  # imported here, as these load torch
    from ..xglue.report.tables import ran_on, side_by_side

    try:
        found = collect(folder)
    except FileNotFoundError:
        return "\n*No results yet.*\n\n"
    parts = []
    for groups in side_by_side(found):
        main = [group for group in groups if group.main]
        parts += [f"*Model: {groups[0].result['model']}. {ran_on(groups)}*", _data(groups), _methods(main)]
        parts.append(_claims(groups, main))
    return "\n" + "\n\n".join(parts) + "\n\n"


def _data(groups) -> str:
    from ..xglue.report.tables import METRICS

    rows = []
    for group in groups:
        examples, given = group.result["data"]["examples"], group.configuration
        tested = sorted({count for name, count in examples.items() if name.startswith("test ")})
        seeds = sorted({len(runs.results) for runs in group.runs.values()})
        every = [result for runs in group.runs.values() for own in runs.by_rate.values() for result in own.values()]
        seconds = sum(sum(result["seconds"].values()) for result in every) / len(every)
        rows.append([
            group.name, METRICS[group.task.metric].split(" (")[0], str(len(group.languages)),
            str(len(group.runs)), _range(seeds), ", ".join(f"{lr:g}" for lr in group.rates),
            f"{examples['train']:,} x {given['epochs']}", _range(tested), str(len(every)), f"{seconds:.0f}",
        ])  # fmt: skip
    header = ["data set", "metric", "languages", "methods", "seeds", "learning rates"]
    header += ["trained on x epochs", "tested on, per language", "runs, all rates", "seconds per run"]
    return markdown(header, rows)


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" + (f" to {numbers[-1]:,}" if len(numbers) > 1 else "")


def _methods(groups) -> str:
    """Returns means over languages and seeds, and differences to SFT paired by data set."""
    from ..xglue.report.tables import marked, over_tasks, pairwise, ranks
    from ..xglue.titles import MISSING, TITLES

    methods = [method for method in TITLES if any(method in group.runs for group in groups)]
    means = over_tasks(groups, methods)
    minus_sft = {first: test for first, second, test in pairwise(groups, [*methods[1:], "sft"]) if second == "sft"}
    columns = [*(group.name for group in groups), "Avg."]
    marks = {
        column: ranks({method: means[method, column] for method in methods if (method, column) in means})
        for column in columns
    }
    rows = []
    for method in methods:
        cells = [
            marked(f"{means[method, column]:.2f}", marks[column][method]) if (method, column) in means else MISSING
            for column in columns
        ]
        rows.append([TITLES[method], *cells, _difference(minus_sft[method]) if method in minus_sft else MISSING])
    return markdown(["method", *columns, "minus SFT ± 95 %"], rows)


def _claims(groups, main) -> str:
    from ..xglue.report.claims import claims, over_data_sets, verdict
    from ..xglue.titles import MISSING

    columns = {group.name: {claim: test for claim, _, test in claims(group)} for group in groups}
    over = {claim: test for claim, _, test in over_data_sets(main) if test.n > 1}
    if over:
        columns[f"over {max(test.n for test in over.values())} data sets"] = over
    rows = []
    for claim in dict.fromkeys(claim for own in columns.values() for claim in own):
        tests = [own.get(claim) for own in columns.values()]
        words = [MISSING if test is None else f"{_difference(test)} {WORDS[verdict(test)]}".strip() for test in tests]
        rows.append([claim, *words])
    return markdown(["the paper's claim", *columns], rows)


WORDS = {"holds": "**holds**", "does not hold": "**does not hold**", "not resolved": "", "too few": "(too few)"}


def _difference(test) -> str:
    """Returns a difference in points, with half of its 95 % interval."""
    return f"{test.difference:+.2f}" + ("" if test.high is None else f" ± {test.high - test.difference:.2f}")
