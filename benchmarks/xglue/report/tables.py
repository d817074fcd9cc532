"""Makes the paper's tables and figures from the results in a folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runs.learning_rate import english_dev
from ..scores import statistics
from ..titles import MISSING, TITLES
from . import claims, figures, paper
from .collect import Group, collect
from .page import Page

METRICS = {
    "accuracy": "accuracy", "chunk_f1": "F1 of entities", "ndcg": "nDCG", "answer_f1": "F1 of answers",
    "chunk_precision": "precision of chunks of equal tags (what XGLUE's evaluator computes for POS)",
}  # fmt: skip
OFFICIAL = ("xnli", "nc", "ner", "pawsx", "pos", "qam", "qadsm", "wpr", "mlqa")  # table X's columns
PAPERS = tuple(TITLES)[:8]  # the methods of the paper's tables


def report(results: Path, output: Path) -> None:
    """Writes report.md, report.html, a CSV per table and a PNG per figure into ``output``.

    Raises:
        FileNotFoundError, ValueError: as ``collect``.
    """
    groups = collect(results)
    page = Page(output, "GradDrop: zero-shot transfer after fine-tuning on English")
    page.text(
        "Scores are percent. ± is the standard deviation over seeds. **Bold** is the best mean of a column, † the "
        f"second best, {MISSING} a missing one. Avg. is the mean over all languages, as XGLUE has it; zero-shot is "
        "that without English, which was trained on."
    )
    for group in groups:
        _task(page, group, _methods(group, groups))
    for own in side_by_side(groups):
        _over_tasks(page, [group for group in own if group.main])
    page.write()


def side_by_side(groups: list[Group]) -> Iterator[list[Group]]:
    """Groups tables whose numbers can be compared: those of one model, on XGLUE's data or on stand-ins."""
    for model in dict.fromkeys(group.configuration["model"] for group in groups):
        for official in (True, False):
            own = [g for g in groups if g.configuration["model"] == model and g.task.official is official]
            if own:
                yield own


def _methods(group: Group, groups: list[Group]) -> list[str]:
    """Returns the rows of a table: methods that were run for any table (for a task's further configurations only their
    own), and for XGLUE's tasks also the paper's.
    """
    ran = {method for other in (groups if group.main else [group]) for method in other.runs}
    ran |= set(PAPERS if group.task.official else ())
    return [method for method in TITLES if method in ran]


def caption(group: Group) -> str:
    """Describes model, data, training and devices: all that a table needs beside its numbers."""
    facts, given = group.result, group.configuration
    examples = facts["data"]["examples"]
    tested = sorted({count for name, count in examples.items() if name.startswith("test ")})
    train = f"{examples['train']:,} English examples to train on"
    test = f"{tested[0]:,}" + (f" to {tested[-1]:,}" if len(tested) > 1 else "") + " per language to test"
    best = "English dev" if given["select"] == "en" else "the mean of all languages' dev (not zero-shot)"
    kind = "official data of XGLUE" if group.task.official else "a stand-in, not a task of XGLUE"
    parts = [
        f"Model: {facts['model']}. Data: {group.data_name}, {kind}: {train}, {test}. "
        f"Metric: {METRICS[group.task.metric]}.",
        f"{given['epochs']} epochs, batch {given['batch_size']}, {given['precision']}, p {given['p']:g} where a method "
        f"has a constant one; best epoch by {best}; {_rates(group)}",
        ran_on([group]),
    ]
    return " ".join(parts)


def ran_on(groups: list[Group]) -> str:
    """Returns devices, versions and commits of all their runs."""
    results = [result for group in groups for result in group.results()]
    several = lambda values: ", ".join(dict.fromkeys(map(str, values)))
    return (
        f"Ran on: {several(result['machine']['device'] for result in results)}; "
        f"torch {several(result['versions']['torch'] for result in results)}; "
        f"commit {several(short_commit(result['commit']) for result in results)}."
    )


def short_commit(commit: str | None) -> str:
    """Returns nine digits, and the + of a checkout with changes."""
    return "unknown" if commit is None else commit[:9] + ("+" if commit.endswith("+") else "")


def _rates(group: Group) -> str:
    tuned = [runs for runs in group.runs.values() if len(runs.by_rate) > 1]
    if not tuned:
        return "the learning rate was given, not chosen."
    rates = sorted({lr for runs in tuned for lr in runs.by_rate})
    seeds = sorted({seed for runs in tuned for seed in runs.tuning})
    text = ", ".join(f"{lr:g}" for lr in rates)
    return (
        f"learning rate of each method out of {text} by mean English dev over seeds {', '.join(map(str, seeds))} "
        "(also in the table, where it has them)."
    )


def _task(page: Page, group: Group, methods: list[str]) -> None:
    printed = paper.table_of(group.task.name)
    number = f" (the paper's table {printed.number})" if printed else ""
    page.heading(f"{group.data_name}{number}" + (f": {group.name}" if group.name != group.task.name else ""))
    page.text(caption(group))
    if printed:
        other = "" if "xlm-roberta-large" in group.configuration["model"] else " Its model is XLM-R-Large, this is not."
        page.text(" ".join(["In brackets: what the paper prints." + other, *printed.notes]))
    columns = [*group.languages, "avg", "zero"]
    cells, rows = _cells(group, methods, columns)
    header = ["method", "lr", "seeds", *group.languages, "Avg.", "zero-shot"]
    lines = []
    for method in methods:
        runs, row = group.runs.get(method), printed.row(method) if printed else None
        shown = [cells[method, column] + _bracket(row, column) for column in columns]
        lr, seeds = (f"{runs.lr:g}", str(len(runs.results))) if runs else (MISSING, "0")
        lines.append([TITLES[method], lr, seeds, *shown])
    page.table(header, lines)
    page.csv(f"{group.name}-scores", rows)
    _rates_table(page, group)
    _differences(page, group)
    _claims(page, group)
    if any(len(result["test"]) > 1 for result in group.results()):
        figures.by_epoch(page.folder / f"{group.name}-epochs.png", group)
        page.figure(
            f"{group.name}-epochs.png",
            f"As the paper's figure 2, {group.data_name}: test score by epoch, mean over languages; bands are ± one "
            "standard deviation over seeds.",
        )
    if "sft" in group.runs and len(group.runs) > 1:
        figures.gains(page.folder / f"{group.name}-gains.png", group)
        page.figure(
            f"{group.name}-gains.png",
            f"As the paper's figure 4, {group.data_name}: gain over SFT by language, points, mean over the seeds that "
            "both have.",
        )


def _rates_table(page: Page, group: Group) -> None:
    """Adds the results of every learning rate, to show how much of a difference is due to the choice of the rate."""
    rates = group.rates
    if len(rates) < 2:
        return
    page.text(
        "Every learning rate: mean English dev score (best epoch) / mean test score over all languages, of so many "
        "seeds. **Bold** is the one chosen, by English dev over the seeds that all rates have."
    )
    lines, rows = [], []
    for method, runs in group.runs.items():
        cells = []
        for lr in rates:
            own = runs.at(lr) if lr in runs.by_rate else None
            if own is None:
                cells.append(MISSING)
                continue
            dev = 100 * statistics.mean([english_dev(result) for result in own.results.values()])
            test = statistics.mean(list(own.scores("avg").values()))
            cells.append(marked(f"{dev:.2f} / {test:.2f}", int(lr == runs.lr)) + f" ({len(own.results)})")
            rows.append({
                "method": method, "lr": lr, "seeds": len(own.results), "dev_en": dev, "test_avg": test,
                "chosen": lr == runs.lr,
            })  # fmt: skip
        lines.append([TITLES[method], *cells])
    page.table(["method", *(f"{lr:g}" for lr in rates)], lines)
    page.csv(f"{group.name}-rates", rows)


def _bracket(row: paper.Row | None, column: str) -> str:
    if row is None or column == "zero":
        return ""
    value = row.average if column == "avg" else row.values.get(column)
    return "" if value is None else f" ({value:.2f})"


def _cells(group: Group, methods: Iterable[str], columns: list[str]) -> tuple[dict, list[dict]]:
    """Returns ({(method, column): text}, the same as rows for a CSV)."""
    values = {
        (method, column): list(group.runs[method].scores(column).values())
        for method in methods for column in columns if method in group.runs
    }  # fmt: skip
    means = {key: statistics.mean(own) for key, own in values.items() if own}
    cells, rows = {}, []
    for column in columns:
        marks = ranks({method: means[method, column] for method in methods if (method, column) in means})
        for method in methods:
            own = values.get((method, column))
            if not own:
                cells[method, column] = MISSING
                continue
            mean, spread = means[method, column], statistics.sd(own)
            text = marked(f"{mean:.2f}", marks[method])
            cells[method, column] = text if spread is None else f"{text} ± {spread:.2f}"
            rows.append({
                "method": method, "lr": group.runs[method].lr, "seeds": len(own), "column": column, "mean": mean,
                "sd": spread, "rank": marks[method],
            })  # fmt: skip
    return cells, rows


def ranks(values: dict[str, float]) -> dict[str, int]:
    """Returns 1 for the best, 2 for the second best, 0 for others. Equal values have equal rank. One alone has none."""
    best = sorted(set(values.values()), reverse=True)[:2]
    if len(values) < 2:
        return dict.fromkeys(values, 0)
    return {name: best.index(value) + 1 if value in best else 0 for name, value in values.items()}


def marked(text: str, rank: int) -> str:
    """Adds the table's mark of a rank."""
    return {0: text, 1: f"**{text}**", 2: f"{text}†"}[rank]


def against_sft(group: Group, column: str) -> dict[str, statistics.Paired]:
    """Returns each method's scores minus SFT's, paired by the seeds that both have."""
    base, found = group.runs["sft"].scores(column), {}
    for method, runs in group.runs.items():
        own = runs.scores(column)
        seeds = sorted(base.keys() & own.keys())
        if method != "sft" and seeds:
            found[method] = statistics.paired([own[seed] for seed in seeds], [base[seed] for seed in seeds])
    return found


def holm_adjusted(tests: dict[str, statistics.Paired]) -> dict[str, float]:
    """Corrects each method's p by Holm for their number; without methods of one seed, which have no p."""
    judged = [method for method, test in tests.items() if test.p is not None]
    return dict(zip(judged, statistics.holm([tests[method].p for method in judged])))


def _differences(page: Page, group: Group) -> None:
    if "sft" not in group.runs:
        return
    rows, lines = [], []
    for column, name in (("avg", "Avg."), ("zero", "zero-shot")):
        tests = against_sft(group, column) if group.runs["sft"].scores(column) else {}
        adjusted = holm_adjusted(tests)
        for method, test in tests.items():
            interval = MISSING if test.low is None else f"{test.low:+.2f} to {test.high:+.2f}"
            numbers = [MISSING] * 3 if test.p is None else [f"{test.t:.2f}", f"{test.p:.3f}", f"{adjusted[method]:.3f}"]
            lines.append([TITLES[method], name, str(test.n), f"{test.difference:+.2f}", interval, *numbers])
            rows.append({
                "method": method, "column": column, "seeds": test.n, "difference": test.difference, "low": test.low,
                "high": test.high, "t": test.t, "p": test.p, "p_holm": adjusted.get(method),
            })  # fmt: skip
    if lines:
        page.text(
            "Difference to SFT in points, paired by seed (same head, same batches): mean, its 95 % confidence "
            "interval, two-sided paired t test, and p corrected by Holm for as many methods."
        )
        page.table(["method", "column", "seeds", "difference", "95 %", "t", "p", "p, Holm"], lines)
        page.csv(f"{group.name}-differences", rows)


def _claims(page: Page, group: Group) -> None:
    header, lines = claims.table(group)
    if lines:
        page.text(
            "The paper's claims, each as a difference that must be above 0 (points, paired by seed, 95 % interval): it "
            "holds here if the whole interval is above 0, does not if all of it is below, else so many seeds do not "
            "decide it; fewer than three are too few. The rival of a claim to be best is the one that was best by "
            "these same scores: luck is on its side."
        )
        page.table(header, lines)


def over_tasks(groups: list[Group], methods: Iterable[str]) -> dict[tuple[str, str], float]:
    """Returns {(method, group's name or "Avg."): mean over languages and seeds}; "Avg." for methods with a score in
    every group.
    """
    means = {}
    for method in methods:
        own = {g.name: statistics.mean(list(g.runs[method].scores("avg").values())) for g in groups if method in g.runs}
        means |= {(method, name): value for name, value in own.items()}
        if len(own) == len(groups):
            means[method, "Avg."] = statistics.mean(list(own.values()))
    return means


def _over_tasks(page: Page, groups: list[Group]) -> None:
    """Adds table X and figure 3: one for XGLUE's tasks, one for stand-ins. groups: one per task."""
    model, official = groups[0].configuration["model"], groups[0].task.official
    methods = [method for method in TITLES if any(method in g.runs for g in groups) or (official and method in PAPERS)]
    by_name = {group.name: group for group in groups}
    names = list(by_name)
    if official:
        names = [next((n for n in names if by_name[n].task.name == task), task) for task in OFFICIAL]
    short = Path(model).name
    page.heading(f"Understanding score (the paper's table X), {short}" if official else f"Mean over stand-ins, {short}")
    if official:
        page.text(
            "Mean over languages of each task's official score, then over the nine tasks. In brackets: what the paper "
            "prints. " + " ".join(paper.tables()["X"].notes)
        )  # fmt: skip
    else:
        page.text("Mean over languages of each data set's score, then over the data sets. None is a task of XGLUE.")
    means = over_tasks(groups, methods)
    if len(names) > len(groups):  # the understanding score is a mean over all nine
        means = {key: value for key, value in means.items() if key[1] != "Avg."}
    lines, printed = [], paper.tables()["X"] if official else None
    marks = {
        name: ranks({method: means[method, name] for method in methods if (method, name) in means})
        for name in [*names, "Avg."]
    }
    for method in methods:
        row, cells = printed.row(method) if printed else None, []
        for name in [*names, "Avg."]:
            value = means.get((method, name))
            text = MISSING if value is None else marked(f"{value:.2f}", marks[name][method])
            task = by_name[name].task.name if name in by_name else name
            column = "avg" if name == "Avg." else task
            cells.append(text + _bracket(row, column))
        lines.append([TITLES[method], *cells])
    page.table(["method", *(n if n not in by_name else by_name[n].name for n in names), "Avg."], lines)
    kind = f"{'official' if official else 'stand-ins'}-{short}"
    page.csv(f"{kind}-means", [
        {"method": method, "task": name, "mean": value} for (method, name), value in means.items()
    ])  # fmt: skip
    _pairwise(page, groups, methods, kind)
    lines = [
        [f"{claim}: {measured}", claims.cell(test, "data set")]
        for claim, measured, test in claims.over_data_sets(groups) if test.n > 1
    ]  # fmt: skip
    if lines:
        page.text(
            "The paper's claims over these data sets: each data set's mean over seeds is one score, at each method's "
            "own rate; differences are paired by data set."
        )
        page.table(["the paper's claim: what is measured", "each method at its own rate"], lines)


def pairwise(groups: list[Group], methods: Iterable[str]) -> list[tuple[str, str, statistics.Paired]]:
    """Makes paired t tests between all methods over the groups' mean scores (the paper's figure 3), two groups at
    least.
    """
    mean = lambda runs: statistics.mean(list(runs.scores("avg").values()))
    scores = {method: {g.name: mean(g.runs[method]) for g in groups if method in g.runs} for method in methods}
    found, names = [], list(scores)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            common = sorted(scores[first].keys() & scores[second].keys())
            if len(common) > 1:
                pairs = ([scores[method][name] for name in common] for method in (first, second))
                found.append((first, second, statistics.paired(*pairs)))
    return found


def _pairwise(page: Page, groups: list[Group], methods: list[str], kind: str) -> None:
    tests = pairwise(groups, methods)
    if not tests:
        return
    adjusted = statistics.holm([test.p for _, _, test in tests])
    figures.t_matrix(page.folder / f"{kind}-t.png", groups, methods, tests, adjusted)
    most = max(test.n for _, _, test in tests)
    page.figure(
        f"{kind}-t.png",
        f"As the paper's figure 3: two-sided paired t statistics between methods (row minus column) over {most} "
        f"{'tasks of XGLUE' if groups[0].task.official else 'stand-ins'}, p corrected by Holm for {len(tests)} pairs; "
        "a star where that is at most 0.05.",
    )
    page.csv(f"{kind}-t", [
        {"first": a, "second": b, "tasks": test.n, "difference": test.difference, "t": test.t, "p": test.p, "p_holm": p}
        for (a, b, test), p in zip(tests, adjusted)
    ])  # fmt: skip
