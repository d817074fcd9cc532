"""The numbers in the running text of docs/results.md are those of the committed runs; render makes its tables."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.xglue.report.claims import claims  # noqa: E402
from benchmarks.xglue.report.collect import collect  # noqa: E402
from benchmarks.xglue.report.tables import side_by_side  # noqa: E402
from benchmarks.xglue.scores.statistics import holm, mean, paired, sd  # noqa: E402


@pytest.fixture(scope="module")
def groups():
    """{data set: its runs}"""
    found = collect(ROOT / "benchmarks/results/xglue")
    return {group.name: group for groups in side_by_side(found) for group in groups}


def said(*parts: str) -> None:
    """The page has this text, whatever its line breaks."""
    page = " ".join((ROOT / "docs/results.md").read_text().split())
    assert " ".join(parts) in page, " ".join(parts)


def minus_sft(group, method, column="avg"):
    own, sft = group.runs[method].scores(column), group.runs["sft"].scores(column)
    return paired([own[seed] for seed in sorted(own)], [sft[seed] for seed in sorted(own)])


def claim_of(group, name):
    (test,) = [test for claim, _, test in claims(group) if claim == name]
    return test


def half(test) -> str:
    return f"{test.high - test.difference:.1f}"


def test_what_is_resolved(groups):
    beat = {name: claim_of(groups[name], "masked gradients beat SFT") for name in ("sib200", "ud-pos")}
    said(f"Sixteen seeds of SIB-200 resolve {half(beat['sib200'])} of a point, four of UD POS {half(beat['ud-pos'])},")
    others = [method for method in groups["nusax"].runs if method != "sft"]
    assert len(others) == 10 and all(minus_sft(groups["nusax"], method).difference < 0 for method in others)


def test_top_down_freezing(groups):
    group = groups["sib200"]
    others = [method for method in group.runs if method != "sft"]
    tests = {method: minus_sft(group, method) for method in others}
    p = dict(zip(others, holm([tests[method].p for method in others])))["gradfreeze-topdown"]
    best = tests["gradfreeze-topdown"]
    said(f"by {best.difference:.2f} points ({best.low:.2f} to {best.high:.2f}; p {p:.3f} after Holm's")
    spread = [sd(list(group.runs[method].scores("avg").values())) for method in ("gradfreeze-topdown", "sft")]
    said("Its standard deviation over seeds is {:.2f} there, SFT's is {:.2f}.".format(*spread))
    assert [method for method in others if tests[method].low > 0] == ["gradfreeze-topdown"]


def test_graddrop_epoch(groups):
    tests = {name: claim_of(group, "GradDrop-Epoch is best") for name, group in groups.items()}
    said(f"is best on UNER by {tests['uner'].difference:.1f} points.")
    assert f"{-tests['ud-pos'].difference:.1f}" in ("0.4", "0.5")  # "half a point"
    assert all(tests[name].high < 0 for name in ("sib200", "ud-pos", "nusax"))


def test_under_resourced_languages(groups):
    group = groups["nusax"]
    dropping = [method for method in group.runs if "graddrop" in method]
    by = {
        language: mean([minus_sft(group, method, language).difference for method in dropping])
        for language in group.languages
    }
    within = max(abs(by["en"]), abs(by["id"]))
    said(f"the eight GradDrop methods are within {within:.1f} points of SFT in the mean.")
    assert len(dropping) == 8
    said(f"They are {-by['jv']:.1f} below it in Javanese, and about 7 in Minangkabau, Balinese and Toba Batak")
    assert all(round(-by[language]) == 7 for language in ("min", "ban", "bbc"))


def after(group, method, epoch):
    results = group.runs[method].results.values()
    tests = [result["test"][str(epoch)] for result in results]
    return mean([100 * mean([score["official"] for score in test.values()]) for test in tests])


def test_epochs(groups):
    group = groups["sib200-2"]
    assert group.configuration["epochs"] == 8
    open_ = -claim_of(group, "no overfitting over epochs").low
    said(f"by more than the {open_:.1f} points that three seeds leave open.")
    said(f"SFT's mean fell by {after(group, 'sft', 4) - after(group, 'sft', 8):.1f} (")


def test_uner_at_the_higher_rate(groups):
    runs = groups["uner"].at(4e-4).runs
    (steps,) = {result["losses"][-1][0] for own in runs.values() for result in own.results.values()}
    said(f"UNER's {steps} steps are too few to learn it.")
    scores = {method: list(own.scores("avg").values()) for method, own in runs.items()}
    assert scores["sft"] == [0]
    for method in ("graddrop", "layer-graddrop"):
        lowest, next_one = sorted(scores[method])[:2]
        assert round(lowest) == 0 < round(next_one)
    survived = ("graddrop-epoch", "graddrop-epoch-toggle", "anneal-graddrop", "gradfreeze-topdown")
    found = [score for method in survived for score in scores[method]]
    assert all(len(scores[method]) == 4 for method in (*survived, "graddrop", "layer-graddrop"))
    said(f"reached {min(found):.0f} to {max(found):.0f} with all seeds.")


def test_how_much_was_run(groups):
    assert {len(group.runs) for group in groups.values() if group.main} == {11}
    said("Each was run with eleven methods.")
    assert {len(own.results) for name in ("xquad", "xquad-match") for own in groups[name].runs.values()} == {1}
    assert {len(own.tuning) for own in groups["sib200"].runs.values()} == {4}
