"""The paper's claims, as differences that our own runs can decide."""

from collections.abc import Iterable, Iterator

from ..scores import statistics
from ..titles import MISSING, TITLES
from .collect import Group, Runs

# Our languages with less than 1 GB of packed text in CC-100 (ur 884 MB, sw 332 MB, jv 37 MB, su 15 MB;
# data.statmt.org/cc-100), or with none. CC-100 is XLM-R's training texts rebuilt (Wenzek et al. 2020).
UNDER_RESOURCED = ("sw", "ur", "jv", "su", "ace", "ban", "bbc", "bjn", "bug", "mad", "min", "nij")
BEST = ("layer-graddrop", "graddrop-epoch")


Scores = dict[str, dict]  # {method: {seed or data set: score in percent, mean over languages}}


def claims(group: Group) -> Iterator[tuple[str, str, statistics.Paired]]:
    """Returns (the claim, what is measured, the difference in points, paired by seed) for claims that the runs bear
    on.
    """
    runs = group.runs
    yield from _of_scores({method: own.scores("avg") for method, own in runs.items()})
    dropping = [own for method, own in runs.items() if "graddrop" in method]
    poor = [language for language in group.languages if language in UNDER_RESOURCED]
    rich = [language for language in group.languages if language not in ("en", *UNDER_RESOURCED)]
    if "sft" in runs and dropping and poor and rich:
        measured = f"gain over SFT, mean of {_names(runs)}: {' '.join(poor)} minus {' '.join(rich)}"
        gains = [_gains(dropping, runs["sft"], languages) for languages in (poor, rich)]
        yield from _row("under-resourced languages gain most", measured, *gains)
    last = group.configuration["epochs"]
    middle = (last + 1) // 2
    if dropping and middle < last:
        measured = f"Avg., mean of {_names(runs)}: after epoch {last} minus after {middle}"
        yield from _row("no overfitting over epochs", measured, *(_after(dropping, epoch) for epoch in (last, middle)))


def over_data_sets(groups: list[Group]) -> Iterator[tuple[str, str, statistics.Paired]]:
    """As ``claims``, for each data set's mean over seeds: paired by data set, of those that both sides have."""
    scores: Scores = {}
    for group in groups:
        for method, runs in group.runs.items():
            scores.setdefault(method, {})[group.name] = statistics.mean(list(runs.scores("avg").values()))
    yield from _of_scores(scores)


def _of_scores(scores: Scores) -> Iterator[tuple[str, str, statistics.Paired]]:
    """Returns the claims about means over languages."""
    dropping = [own for method, own in scores.items() if "graddrop" in method]
    if "sft" in scores and dropping:
        common = set.intersection(*(set(own) for own in [scores["sft"], *dropping]))
        masked = {key: statistics.mean([own[key] for own in dropping]) for key in common}
        yield from _row("masked gradients beat SFT", f"Avg., mean of {_names(scores)} minus SFT", masked, scores["sft"])
    common = set.intersection(*map(set, scores.values()))  # means over different keys cannot be compared
    others = [method for method in scores if method not in BEST]
    rivals = {method: statistics.mean([scores[method][key] for key in common]) for method in others if common}
    for method in BEST:
        if method in scores and len(rivals) > 1:
            rival = max(rivals, key=rivals.__getitem__)
            measured = f"Avg., minus the best of the methods but {' and '.join(TITLES[name] for name in BEST)}"
            yield from _row(f"{TITLES[method]} is best", measured, scores[method], scores[rival])
    if {"gradfreeze-topdown", "gradfreeze-bottomup"} <= scores.keys():
        top, bottom = (scores[f"gradfreeze-{order}"] for order in ("topdown", "bottomup"))
        yield from _row("freezing top-down beats bottom-up", "Avg., difference of the two", top, bottom)


def table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Returns (header, rows) of Markdown. One column has the rate that each method chose for itself. As that choice may
    decide more than the method, the others have all methods at the same rate.
    """
    variants = {"each method at its own rate": group}
    if len(group.rates) > 1:
        variants |= {f"all at {lr:g}": group.at(lr) for lr in group.rates}
    found = {name: {claim: rest for claim, *rest in claims(variant)} for name, variant in variants.items()}
    measured = {claim: rest[0] for own in found.values() for claim, rest in own.items()}
    rows = []
    for claim, what in measured.items():
        cells = [cell(own[claim][1]) if claim in own else MISSING for own in found.values()]
        rows.append([f"{claim}: {what}", *cells])
    return ["the paper's claim: what is measured", *variants], rows


def cell(test: statistics.Paired, pair: str = "seed") -> str:
    """Formats a claim's difference. pair: what a pair of scores has in common."""
    pairs = f"{test.n} {pair}" + "s" * (test.n > 1)
    if test.low is None:
        return f"{test.difference:+.2f}, {pairs}"
    return f"{test.difference:+.2f} ({test.low:+.2f} to {test.high:+.2f}), {pairs}: {verdict(test)}"


def verdict(test: statistics.Paired) -> str:
    """Judges a claim that the difference is above 0, by its confidence interval. Scores as coarse as a count of
    sentences have two equal differences by chance too often; their interval is then a point.
    """
    if test.n < 3 or test.low is None or test.high is None:
        return "too few"
    return "holds" if test.low > 0 else "does not hold" if test.high < 0 else "not resolved"


def _names(methods: Iterable[str]) -> str:
    dropping = [method for method in methods if "graddrop" in method]
    return f"{len(dropping)} GradDrop methods" if len(dropping) > 1 else TITLES[dropping[0]]


def _row(claim: str, measured: str, first: dict, second: dict) -> Iterator[tuple[str, str, statistics.Paired]]:
    common = sorted(first.keys() & second.keys())
    if common:
        yield claim, measured, statistics.paired([first[key] for key in common], [second[key] for key in common])


def _gains(methods: list[Runs], sft: Runs, columns: list[str]) -> dict[int, float]:
    """Returns {seed: mean over methods and columns of the score minus SFT's}, for the seeds that all have."""
    pairs = [(own.scores(column), sft.scores(column)) for own in methods for column in columns]
    seeds = set.intersection(*(first.keys() & second.keys() for first, second in pairs))
    return {seed: statistics.mean([first[seed] - second[seed] for first, second in pairs]) for seed in seeds}


def _after(methods: list[Runs], epoch: int) -> dict[int, float]:
    """Returns {seed: mean over methods and languages of the test score after that epoch}, for the seeds that all
    have.
    """
    found: list[dict[int, float]] = []
    for own in methods:
        tests = {seed: result["test"].get(str(epoch)) for seed, result in own.results.items()}
        found.append({
            seed: 100 * statistics.mean([score["official"] for score in test.values()])
            for seed, test in tests.items() if test
        })  # fmt: skip
    seeds = set.intersection(*map(set, found))
    return {seed: statistics.mean([own[seed] for own in found]) for seed in seeds}
