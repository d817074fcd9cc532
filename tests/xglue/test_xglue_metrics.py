"""The evaluator's numbers: Unicoder's published predictions give Unicoder's published scores; where seqeval differs."""

import ast
import random
from collections import Counter
from itertools import groupby

import numpy as np
import official_xglue  # noqa: F401  (makes benchmarks importable)
import pytest
from lazy import seqeval, sklearn

from benchmarks.xglue.examples import standins
from benchmarks.xglue.examples.kinds import SpanExample, TextExample, WordsExample
from benchmarks.xglue.examples.load import load
from benchmarks.xglue.examples.pack import unpack
from benchmarks.xglue.scores import metrics, predictions
from benchmarks.xglue.tasks import TASKS

UD_POS, NER, WPR, MLQA, NC, PAWSX = (TASKS[name] for name in ("ud-pos", "ner", "wpr", "mlqa", "nc", "pawsx"))


@pytest.fixture(scope="module")
def unicoder(tmp_path_factory):
    """(folder of prediction files, {language: official POS score})"""
    files = unpack((standins.DIRECTORY / "unicoder.tar.gz").read_bytes())
    folder = tmp_path_factory.mktemp("unicoder")
    (folder / UD_POS.folder).mkdir()
    for language in UD_POS.languages:
        (folder / UD_POS.folder / f"{language}.prediction").write_bytes(files[f"POS/{language}.prediction"])
    lines = files["evaluation_results_unicoder_eval.txt"].decode().splitlines()
    return folder, ast.literal_eval(lines[lines.index("POS") + 1])


@pytest.mark.parametrize("language", UD_POS.languages)
def test_published_predictions_give_the_published_scores(unicoder, language):
    folder, official = unicoder
    examples = load(UD_POS, language, "test")
    predicted = predictions.read(folder, UD_POS, language, examples)
    found = metrics.score(UD_POS, language, examples, predicted)
    if language == "zh":  # the rebuilt test data gives another number here, and why is not known
        assert abs(found["official"] - official["zh"]) < 4e-4
    else:
        assert abs(found["official"] - official[language]) < 1e-12
    assert abs(found["accuracy"] - official[language]) > 5e-3  # what the official number is not


def test_one_published_prediction_is_shorter_than_its_sentence(unicoder):
    examples = load(UD_POS, "ru", "test")
    predicted = predictions.read(unicoder[0], UD_POS, "ru", examples)
    assert any(len(tags) < len(example.words) for tags, example in zip(predicted, examples))


@pytest.mark.filterwarnings("ignore:.*seems not to be NE tag")
def test_newer_seqeval_gives_other_numbers_for_tags_without_prefix(unicoder):
    folder, official = unicoder
    for language in ("en", "vi"):
        examples = load(UD_POS, language, "test")
        predicted = predictions.read(folder, UD_POS, language, examples)
        filled = [[*tags, *["O"] * (len(e.tags) - len(tags))] for tags, e in zip(predicted, examples)]
        newer = seqeval.precision_score([example.tags for example in examples], filled)
        assert abs(newer - official[language]) > 4e-5


def _tags(rng, count: int, labels) -> list[str]:
    return [rng.choice(labels) for _ in range(count)]


def test_entities_agree_with_seqeval(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(300)]
    gold = [_tags(rng, length, NER.labels) for length in lengths]
    predicted = [[tag if rng.random() < 0.7 else rng.choice(NER.labels) for tag in tags] for tags in gold]
    examples = [WordsExample(str(i), tags, tags) for i, tags in enumerate(gold)]
    found = metrics.score(NER, "en", examples, predicted)
    assert found["official"] == pytest.approx(seqeval.f1_score(gold, predicted), abs=1e-12)
    assert found["precision"] == pytest.approx(seqeval.precision_score(gold, predicted), abs=1e-12)


@pytest.mark.parametrize(
    "tags, wanted",
    [
        ("NOUN NOUN VERB", {("NOUN", 0, 1), ("VERB", 2, 2)}),
        ("SCONJ SCONJ", {("SCONJ", 0, 0), ("SCONJ", 1, 1)}),
        ("SYM SYM X X", {("SYM", 0, 0), ("SYM", 1, 1), ("X", 2, 3)}),
        ("O NOUN O O", {("NOUN", 1, 1)}),
        ("INTJ INTJ", {("INTJ", 0, 1)}),
        ("B-PER I-PER I-LOC", {("PER", 0, 1), ("LOC", 2, 2)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("O I-ORG I-ORG", {("ORG", 1, 2)}),
        ("X", {("X", 0, 0)}),
        ("", set()),
    ],
)
def test_chunks(tags, wanted):
    assert metrics.chunks(tags.split()) == wanted


def test_missing_tags_are_filled_up_with_O():
    examples = [WordsExample("0", list("abcd"), ["DET", "NOUN", "NOUN", "VERB"]), WordsExample("1", ["e"], ["VERB"])]
    found = metrics.score(UD_POS, "en", examples, [["DET", "NOUN"], ["VERB"]])
    # Chunks wanted: DET, NOUN NOUN, VERB, VERB; found: DET, NOUN (half of it), VERB.
    assert found["official"] == found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 4) and found["accuracy"] == pytest.approx(3 / 5)
    # A tag too many is not cut: sentence 1 comes one place too late.
    later = metrics.score(UD_POS, "en", examples, [["DET", "NOUN", "NOUN", "VERB", "ADJ"], ["VERB"]])
    assert later["official"] == pytest.approx(3 / 5)


def _tie_averaged_ndcg(gold: list[float], ours: list[float]) -> float:
    """Linear gains; documents of one score share the mean discount of their places."""
    order = sorted(range(len(ours)), key=lambda i: -ours[i])
    discounts = [1 / np.log2(place + 2) for place in range(len(ours))]
    gained = place = 0
    for _, tied in groupby(order, key=lambda i: ours[i]):
        tied = list(tied)
        gained += sum(gold[i] for i in tied) * np.mean(discounts[place : place + len(tied)])
        place += len(tied)
    best = sum(g * d for g, d in zip(sorted(gold, reverse=True), discounts))
    return gained / best if best else 0.0


def test_ndcg_averages_ties_over_runs_of_one_query(seed):
    rng = random.Random(seed)
    groups = [query for query in [rng.choice("abc") for _ in range(60)] for _ in range(rng.randint(1, 4))]
    groups += ["alone", "none", "none"]
    gold = [rng.choice(WPR.labels) for _ in groups[:-2]] + ["0", "0"]
    predicted = [rng.choice(WPR.labels) for _ in groups]
    examples = [TextExample(str(i), q, "page", label, group=q) for i, (q, label) in enumerate(zip(groups, gold))]
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(groups), key=lambda pair: pair[1])]
    wanted = [
        _tie_averaged_ndcg([float(gold[i]) for i in run], [float(predicted[i]) for i in run])
        for run in runs
        if len(run) > 1
    ]
    assert len(runs) > len(wanted) and len(wanted) > len(set(groups))
    assert wanted[-1] == 0  # nothing relevant
    found = metrics.score(WPR, "fr", examples, predicted)
    assert found["official"] == pytest.approx(np.mean(wanted), abs=1e-12)
    assert found["accuracy"] == pytest.approx(np.mean(np.array(gold) == np.array(predicted)))


def test_a_ranking_needs_two_documents():
    with pytest.raises(ValueError, match="no query has two documents"):
        metrics.score(WPR, "fr", [TextExample("0", "a", "b", "1", group="a")], ["1"])


@pytest.mark.parametrize("task", [NC, PAWSX], ids=lambda task: task.name)
def test_accuracy_and_f1_agree_with_scikit_learn(task, seed):
    rng = random.Random(seed)
    labels = task.labels[:7]  # some never occur
    gold = [rng.choice(labels) for _ in range(200)]
    predicted = [label if rng.random() < 0.6 else rng.choice(labels) for label in gold]
    examples = [TextExample(str(i), "", None, label) for i, label in enumerate(gold)]
    found = metrics.score(task, "de", examples, predicted)
    options = {"average": "macro"} if len(task.labels) > 2 else {"pos_label": "1"}
    assert found["official"] == found["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert found["f1"] == pytest.approx(sklearn.f1_score(gold, predicted, **options))


def test_f1_without_any_of_the_second_label_is_0():
    examples = [TextExample("0", "", None, "0")]
    assert metrics.score(PAWSX, "de", examples, ["0"]) == {"official": 1.0, "accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize(
    "language, answer, gold, f1, exact",
    [
        ("en", "The Danube!", "danube", 1, 1),
        ("en", "a river, the Danube", "Danube", 2 / 3, 0),
        ("de", "die Donau", "Donau", 1, 1),
        ("de", "the Donau", "Donau", 2 / 3, 0),
        ("es", "el río", "Río", 1, 1),
        ("vi", "của sông", "sông", 1, 1),
        ("hi", "एक नदी", "नदी", 2 / 3, 0),
        ("ar", "في النهر", "في نهر", 1, 1),
        ("zh", "多瑙河", "多瑙", 4 / 5, 0),
        ("zh", "《多瑙河》", "多瑙河", 1, 1),
        ("zh", "1999年 abc", "1999 年abc", 1, 1),
        ("ru", "«Дунай»", "дунай", 1, 1),
        ("th", "แม่", "แม", 4 / 5, 0),
        ("en", "", "Danube", 0, 0),
        ("en", "the", "a", 0, 1),  # nothing is left of both: equal, and no token in common
    ],
)
def test_answers_are_normalised_as_in_mlqa(language, answer, gold, f1, exact):
    examples = [SpanExample("q", "?", gold, ((gold, 0),))]
    found = metrics.score(MLQA, language, examples, {"q": answer})
    assert found["official"] == found["f1"] == pytest.approx(f1) and found["exact_match"] == exact


def test_the_best_answer_counts_and_a_missing_one_is_0():
    examples = [
        SpanExample("q", "?", "one two three", (("one", 0), ("two three", 4))),
        SpanExample("unanswered", "?", "one", (("one", 0),)),
    ]
    found = metrics.score(MLQA, "en", examples, {"q": "two", "of another file": "one"})
    assert found == {"official": pytest.approx(1 / 3), "f1": pytest.approx(1 / 3), "exact_match": 0}


def test_mlqa_against_a_plain_count_of_tokens(seed):
    rng = random.Random(seed)
    vocabulary = ["river", "city", "bridge", "old", "new", "1999"]
    examples, answers, wanted = [], {}, []
    for number in range(100):
        gold, ours = (" ".join(rng.choices(vocabulary, k=rng.randint(1, 5))) for _ in "ab")
        examples.append(SpanExample(str(number), "?", gold, ((gold, 0),)))
        answers[str(number)] = ours
        common = sum((Counter(gold.split()) & Counter(ours.split())).values())
        precision, recall = common / len(ours.split()), common / len(gold.split())
        wanted.append(2 * precision * recall / (precision + recall) if common else 0)
    assert metrics.score(MLQA, "en", examples, answers)["official"] == pytest.approx(np.mean(wanted))


def test_as_many_predictions_as_examples():
    with pytest.raises(ValueError, match="predictions: 2 for 1 examples of nc de"):
        metrics.score(NC, "de", [TextExample("0", "", None, "news")], ["news", "news"])
