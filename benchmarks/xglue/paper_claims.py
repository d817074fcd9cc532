"""What the paper claims, as differences that our own runs can decide."""

from collections.abc import Iterator

from . import statistics
from .collect import Group, Runs
from .titles import MISSING, TITLES

# Those of our languages of whose texts XLM-R saw less than 10 GiB (Conneau et al. 2020, table 6), or nothing.
UNDER_RESOURCED = ("sw", "ur", "jv", "su", "ace", "ban", "bbc", "bjn", "bug", "mad", "min", "nij")
BEST = ("layer-graddrop", "graddrop-epoch")


def claims(group: Group) -> Iterator[tuple[str, str, statistics.Paired]]:
    """(the claim, what is measured, the difference in points, paired by seed) for those that the runs bear on."""
    runs = group.runs
    dropping = [own for method, own in runs.items() if "graddrop" in method]
    if "sft" in runs and dropping:
        gains = _gains(dropping, runs["sft"], ["avg"])
        yield from _row(
            "masked gradients beat SFT",
            f"Avg., mean of {_methods(dropping)} minus SFT",
            gains,
            dict.fromkeys(gains, 0.0),
        )
    others = {method: statistics.mean(list(own.scores("avg").values())) for method, own in runs.items()}
    for method in BEST:
        rivals = {name: score for name, score in others.items() if name not in BEST}
        if method in runs and len(rivals) > 1:
            rival = max(rivals, key=rivals.__getitem__)
            measured = f"Avg., minus the best of the methods but {' and '.join(TITLES[name] for name in BEST)}"
            own, other = (runs[name].scores("avg") for name in (method, rival))
            yield from _row(f"{TITLES[method]} is best", measured, own, other)
    if {"gradfreeze-topdown", "gradfreeze-bottomup"} <= runs.keys():
        top, bottom = (runs[f"gradfreeze-{order}"].scores("avg") for order in ("topdown", "bottomup"))
        yield from _row("freezing top-down beats bottom-up", "Avg., difference of the two", top, bottom)
    poor = [language for language in group.languages if language in UNDER_RESOURCED]
    rich = [language for language in group.languages if language not in ("en", *UNDER_RESOURCED)]
    if "sft" in runs and dropping and poor and rich:
        measured = f"gain over SFT, mean of {_methods(dropping)}: {' '.join(poor)} minus {' '.join(rich)}"
        gains = [_gains(dropping, runs["sft"], languages) for languages in (poor, rich)]
        yield from _row("under-resourced languages gain most", measured, *gains)
    last = group.configuration["epochs"]
    middle = (last + 1) // 2
    if dropping and middle < last:
        measured = f"Avg., mean of {_methods(dropping)}: after epoch {last} minus after {middle}"
        yield from _row("no overfitting over epochs", measured, *(_after(dropping, epoch) for epoch in (last, middle)))


def table(group: Group) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of Markdown: with the rate that each method chose for itself and, as that choice may decide more
    than the method, with all of them at the same rate."""
    variants = {"each method at its own rate": group}
    if len(group.rates) > 1:
        variants |= {f"all at {lr:g}": group.at(lr) for lr in group.rates}
    found = {name: {claim: rest for claim, *rest in claims(variant)} for name, variant in variants.items()}
    measured = {claim: rest[0] for own in found.values() for claim, rest in own.items()}
    rows = []
    for claim, what in measured.items():
        cells = [_cell(own[claim][1]) if claim in own else MISSING for own in found.values()]
        rows.append([f"{claim}: {what}", *cells])
    return ["the paper's claim: what is measured", *variants], rows


def _cell(test: statistics.Paired) -> str:
    seeds = f"{test.n} seed" + "s" * (test.n > 1)
    if test.low is None:
        return f"{test.difference:+.2f}, {seeds}"
    return f"{test.difference:+.2f} ({test.low:+.2f} to {test.high:+.2f}), {seeds}: {verdict(test)}"


def verdict(test: statistics.Paired) -> str:
    """Of a claim that the difference is above 0, by its confidence interval."""
    if test.low is None or test.high is None:
        return "one seed"
    return "holds" if test.low > 0 else "does not hold" if test.high < 0 else "not resolved"


def _methods(dropping: list[Runs]) -> str:
    return f"{len(dropping)} GradDrop methods" if len(dropping) > 1 else TITLES[dropping[0].method]


def _row(claim: str, measured: str, first: dict[int, float], second: dict[int, float]):
    seeds = sorted(first.keys() & second.keys())
    if seeds:
        yield claim, measured, statistics.paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])


def _gains(methods: list[Runs], sft: Runs, columns: list[str]) -> dict[int, float]:
    """{seed: mean over methods and columns of the score minus SFT's}, of the seeds that all have."""
    pairs = [(own.scores(column), sft.scores(column)) for own in methods for column in columns]
    seeds = set.intersection(*(first.keys() & second.keys() for first, second in pairs))
    return {seed: statistics.mean([first[seed] - second[seed] for first, second in pairs]) for seed in seeds}


def _after(methods: list[Runs], epoch: int) -> dict[int, float]:
    """{seed: mean over methods and languages of the test score after that epoch}, of the seeds that all have."""
    found: list[dict[int, float]] = []
    for own in methods:
        tests = {seed: result["test"].get(str(epoch)) for seed, result in own.results.items()}
        found.append({
            seed: 100 * statistics.mean([score["official"] for score in test.values()])
            for seed, test in tests.items() if test
        })  # fmt: skip
    seeds = set.intersection(*map(set, found))
    return {seed: statistics.mean([own[seed] for own in found]) for seed in seeds}
