"""Prediction files and `score`: what is written is read, what is cut off or wrong is refused with its line."""

import json
import random

import official_xglue
import pytest

from benchmarks.xglue.__main__ import main
from benchmarks.xglue.examples.load import load
from benchmarks.xglue.scores import predictions
from benchmarks.xglue.scores.score import score_folder
from benchmarks.xglue.tasks import TASKS

OFFICIAL = [name for name, task in TASKS.items() if task.official]


@pytest.fixture
def root(tmp_path):
    return official_xglue.write(tmp_path / "data")


def right(task, examples):
    if task.kind == "span":
        return {example.guid: example.answers[0][0] for example in examples}
    return [example.tags if task.kind == "token" else example.label for example in examples]


@pytest.fixture
def folder(root, tmp_path):
    """Prediction files of all tasks and languages, all of them right."""
    for name in OFFICIAL:
        task = TASKS[name]
        for language in task.languages:
            predictions.write(tmp_path / "ours", task, language, right(task, load(task, language, "test", root)))
    return tmp_path / "ours"


def test_right_predictions_score_1_in_all_tasks(root, folder):
    scores = score_folder(folder, root=root)
    assert list(scores) == OFFICIAL
    for name, rows in scores.items():
        assert list(rows) == [*TASKS[name].languages, "avg"]
        assert all(row["official"] == 1 for row in rows.values())


def test_the_average_is_the_plain_mean_over_the_languages(root, folder):
    path = predictions.write(folder, TASKS["qam"], "fr", ["0", "0"])
    assert path == folder / "QAM" / "fr.prediction" and path.read_text() == "0\n0\n"
    rows = score_folder(folder, ["qam"], "test", root)["qam"]
    assert rows["fr"]["official"] == 0.5 and rows["avg"]["official"] == pytest.approx(2.5 / 3)
    assert rows["fr"]["f1"] == 0 and rows["avg"]["f1"] == pytest.approx(2 / 3)


def test_stand_ins_are_scored_without_a_root(tmp_path):
    task = TASKS["uner"]
    predictions.write(tmp_path, task, "en", right(task, load(task, "en", "dev")))
    assert score_folder(tmp_path, split="dev")["uner"]["avg"]["official"] == 1


def test_nothing_else_is_left_beside_a_prediction_file(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".prediction"}


def test_files_are_those_of_the_official_format(folder):
    person, place = official_xglue.names("de")
    assert (folder / "NER/de.prediction").read_text().startswith("B-PER\nI-PER\nO\n")
    assert (folder / "NER/de.prediction").read_text().endswith("B-LOC\nO\n\nB-PER\nO\n\n")
    assert (folder / "XNLI/de.prediction").read_text() == "entailment\nneutral\ncontradiction\n"
    assert json.loads((folder / "MLQA/de.prediction").read_text()) == {"who-de": person, "where-de": place}


def test_random_predictions_come_back(tmp_path, seed):
    rng = random.Random(seed)
    for name in ("wpr", "pos", "mlqa"):
        task = TASKS[name]
        root = official_xglue.write(tmp_path / name)
        for language in ("de", "zh"):
            examples = load(task, language, "test", root)
            if name == "pos":
                own = [rng.choices(task.labels, k=rng.randint(1, len(example.words))) for example in examples]
            elif name == "wpr":
                own = [rng.choice(task.labels) for _ in examples]
            else:
                own = {example.guid: example.context[rng.randrange(9) :] + "\n„“\u2028" for example in examples}
            predictions.write(tmp_path, task, language, own)
            assert predictions.read(tmp_path, task, language, examples) == own


BROKEN = {
    "cut off": ("xnli", lambda s: s[: s.index("\n") + 1], "de.prediction: 1 labels for 3 examples"),
    "too many": ("xnli", lambda s: s + "neutral\n", "de.prediction: 4 labels for 3 examples"),
    "half a label": ("xnli", lambda s: s[:-4], "de.prediction:3: label 'contradict'"),
    "a blank line": ("qam", lambda s: s.replace("\n", "\n\n", 1), "de.prediction:2: label ''"),
    "nothing": ("nc", lambda s: "", "de.prediction: the file is empty"),
    "a sentence less": ("ner", lambda s: s.split("\n\n")[0] + "\n\n", "de.prediction: 1 sentences for 2 examples"),
    "a tag too many": ("pos", lambda s: "ADJ\n" + s, "de.prediction:9: 8 tags end here, of a sentence of 7 words"),
    "two blank lines": ("pos", lambda s: s.replace("\n\n", "\n\n\n", 1), "de.prediction:9: a second blank line"),
    "another tag": ("pos", lambda s: s.replace("ADP", "PREP"), "de.prediction:5: label 'PREP'"),
    "half of JSON": ("mlqa", lambda s: s[:20], "de.prediction:.: not JSON, or cut off"),
    "a mark before JSON": ("mlqa", lambda s: "\ufeff" + s, "de.prediction:1: not JSON.*BOM"),
    "a mark before a number": ("wpr", lambda s: "\ufeff" + s, r"de.prediction:1: label '\\ufeff4'"),
    "a mark alone": ("qam", lambda s: "\ufeff\n" + s, r"de.prediction:1: label '\\ufeff'"),
    "a list": ("mlqa", lambda s: "[1]", "one JSON object of ids and texts is expected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_the_file_and_the_line(root, folder, case):
    name, change, message = BROKEN[case]
    path = predictions.path(folder, TASKS[name], "de")
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        score_folder(folder, [name], "test", root)
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_a_part_of_the_first_label(root, folder):
    """As in the evaluator, which opens files as UTF-8 and strips white space alone."""
    for name in ("qam", "ner", "pos"):
        path = predictions.path(folder, TASKS[name], "de")
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
        with pytest.warns(UserWarning, match="de.prediction:1: a byte order mark before '(1|B-PER|PROPN)'"):
            rows = score_folder(folder, [name], "test", root)[name]
        assert rows["fr" if name != "ner" else "nl"]["official"] == 1
        found = rows["de"]
        if name == "qam":
            assert found["official"] == 0.5
        else:  # the name of an entity follows the "-", that of a word class begins with the mark
            tags = [tag for example in load(TASKS[name], "de", "test", root) for tag in example.tags]
            assert found["accuracy"] == pytest.approx(1 - 1 / len(tags))
            assert (found["official"] == 1) is (name == "ner")


def test_a_question_without_an_answer_counts_0(root, folder):
    path = predictions.path(folder, TASKS["mlqa"], "de")
    person, _ = official_xglue.names("de")
    for answers, wanted in (({"who-de": person}, 0.5), ({"another": "x"}, 0.0)):
        path.write_text(json.dumps(answers), encoding="utf-8")
        with pytest.warns(UserWarning, match="de.prediction: [12] of 2 questions have no answer.*they count 0"):
            rows = score_folder(folder, ["mlqa"], "test", root)["mlqa"]
        assert rows["de"]["official"] == rows["de"]["exact_match"] == wanted
        assert rows["en"]["official"] == 1 and rows["avg"]["official"] == pytest.approx((6 + wanted) / 7)


def test_languages_are_all_of_the_task_or_those_asked_for(root, folder, capsys):
    command = ["score", str(folder), "--data", str(root), "--tasks", "qam", "xnli"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {name: list(rows) for name, rows in scores.items()} == {
        name: [*TASKS[name].languages, "avg"] for name in ("qam", "xnli")
    }
    for language in TASKS["xnli"].languages:
        if language not in ("de", "en"):
            (folder / "XNLI" / f"{language}.prediction").unlink()
    assert main(command) == 1
    assert "ar.prediction: no such file" in capsys.readouterr().err
    predictions.write(folder, TASKS["qam"], "de", ["0", "0"])
    assert main([*command, "--languages", "de", "en"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores["qam"]) == list(scores["xnli"]) == ["de", "en", "avg"]
    assert [row["official"] for row in scores["qam"].values()] == [0.5, 1, 0.75]
    assert main([*command, "--languages", "sw"]) == 1
    assert "language 'sw': the test split of qam has en, de, fr" in capsys.readouterr().err


def test_what_is_missing_is_named(root, folder, tmp_path):
    (folder / "WPR" / "pt.prediction").unlink()
    with pytest.raises(FileNotFoundError, match="WPR/pt.prediction: no such file"):
        score_folder(folder, root=root)
    with pytest.raises(FileNotFoundError, match="no folder of a task in it; their names are XNLI, PAWSX"):
        score_folder(tmp_path / "data" / "XNLI", root=root)
    with pytest.raises(ValueError, match="tasks: 'paws-x' is none of xnli, pawsx"):
        score_folder(folder, ["paws-x"], root=root)
    with pytest.raises(ValueError, match="split 'train': must be dev or test"):
        score_folder(folder, ["nc"], "train", root)
    with pytest.raises(ValueError, match="root: nc is a task of XGLUE"):
        score_folder(folder, ["nc"])
