"""The official folder: every task, language and split of it is read; errors say what is wrong in which line."""

import json

import official_xglue
import pytest
from official_xglue import names, sentence, text

from benchmarks.xglue.examples.kinds import SpanExample, TextExample, WordsExample
from benchmarks.xglue.examples.load import load
from benchmarks.xglue.tasks import TASKS, languages

OFFICIAL = [name for name, task in TASKS.items() if task.official]


@pytest.fixture
def root(tmp_path):
    return official_xglue.write(tmp_path / "xglue_full_dataset")


def test_there_are_the_nine_tasks_of_the_paper():
    assert OFFICIAL == ["xnli", "pawsx", "nc", "qadsm", "wpr", "qam", "ner", "pos", "mlqa"]
    counts = {name: len(TASKS[name].languages) for name in OFFICIAL}
    assert counts == {"xnli": 15, "pawsx": 4, "nc": 5, "qadsm": 3, "wpr": 7, "qam": 3, "ner": 4, "pos": 18, "mlqa": 7}
    assert all(task.languages[0] == "en" and languages(task, "train") == ("en",) for task in TASKS.values())


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_split_and_language_is_read(root, name):
    task = TASKS[name]
    count = {"xnli": 3, "pawsx": 2, "nc": 2, "qadsm": 3, "wpr": 6, "qam": 2, "ner": 2, "pos": 2, "mlqa": 2}[name]
    for split in ("train", "dev", "test"):
        for language in languages(task, split):
            examples = load(task, language, split, root)
            assert len(examples) == len({example.guid for example in examples}) == count
            for example in examples:
                labels = getattr(example, "tags", [getattr(example, "label", None)])
                assert task.kind == "span" or set(labels) <= set(task.labels)


@pytest.mark.parametrize("language", ["de", "zh"])
def test_columns_go_where_they_belong(root, language):
    person, place = names(language)
    whole = text(language)

    def first(name, own=language):
        return load(TASKS[name], own, "test", root)[0]

    assert first("xnli") == TextExample("test-1", whole, person, "entailment")
    assert first("wpr") == TextExample("test-1", place, f"{whole} {person}", "4", group=place)
    assert first("pos") == WordsExample("test-0", *sentence(language))
    assert first("mlqa") == SpanExample(
        f"who-{language}", "who?", f"{whole} {person}!", ((person, whole.index(person)),)
    )
    if language == "de":
        assert first("pawsx") == TextExample("test-2", whole, whole, "1")
        assert first("nc") == TextExample("test-1", place, whole, "travel")
        assert first("qadsm") == TextExample("test-1", place, f"{whole} {person}", "Good")
        assert first("qam") == TextExample("test-1", f"{place}?", whole, "1")
        assert first("ner").words[:2] == ["Anna", "Berg"] and first("ner").tags[:3] == ["B-PER", "I-PER", "O"]


def test_training_labels_of_xnli_are_read_as_contradiction(root):
    assert [e.label for e in load(TASKS["xnli"], "en", "train", root)] == ["entailment", "neutral", "contradiction"]


def test_both_layouts_of_xnli_are_the_same(root):
    task = TASKS["xnli"]
    rows = [["language", "gold_label", *["-"] * 4, "sentence1", "sentence2", "promptID"]]
    wanted = {}
    for language in task.languages:
        wanted[language] = load(task, language, "dev", root)
        rows += [[language, e.label, *["( parse )"] * 4, e.text, e.pair, "9"] for e in wanted[language]]
        (root / "XNLI" / f"{language}.dev").unlink()
    (root / "XNLI" / "xnli.dev.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    for language in task.languages:
        found = load(task, language, "dev", root)
        assert [(e.text, e.pair, e.label) for e in found] == [(e.text, e.pair, e.label) for e in wanted[language]]


def test_words_keep_what_is_before_the_last_space_and_odd_separators_cut_no_line(root):
    path = root / "POS" / "de.test"
    path.write_text("2\u00a0000 NUM\nx\u2028y X\n\u3000 PUNCT\n\n\n-DOCSTART- O\nEnde NOUN", encoding="utf-8")
    first, second = load(TASKS["pos"], "de", "test", root)
    assert (first.words, first.tags) == (["2\u00a0000", "x\u2028y", "\u3000"], ["NUM", "X", "PUNCT"])
    assert (second.words, second.tags) == (["Ende"], ["NOUN"])


def test_texts_may_have_quotation_marks_and_line_separators(root):
    (root / "QAM" / "xglue.qam.de.dev").write_text('"Wo\u2028?\tIn "Wien\u0085".\t1\r\n', encoding="utf-8")
    assert load(TASKS["qam"], "de", "dev", root) == [TextExample("dev-1", '"Wo\u2028?', 'In "Wien\u0085".', "1")]


def _edit(path, change):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def _mlqa(change):
    def edit(contents):
        data = json.loads(contents)
        change(data["data"][0]["paragraphs"][0])
        return json.dumps(data)

    return edit


BROKEN = {
    "a wrong label": ("qadsm", "QADSM/xglue.qadsm.de.test", lambda s: s.replace("Bad", "bad"), ".test:2: label 'bad'"),
    "a strict label": ("xnli", "XNLI/de.test", lambda s: s.replace("diction", "dictory"), "de.test:3: label"),
    "a wrong tag": ("ner", "NER/de.test", lambda s: s.replace("I-PER", "I-PERSON"), "de.test:4: label 'I-PERSON'"),
    "no tag": ("pos", "POS/de.test", lambda s: s.replace(" NOUN", ""), "de.test:4: 'Buch'"),
    "no label": ("wpr", "WPR/xglue.wpr.de.test", lambda s: s.replace("\t3", ""), "de.test:5: 3 columns, 4 are"),
    "a blank line": ("qam", "QAM/xglue.qam.de.test", lambda s: s.replace("\n", "\n\n", 1), "de.test:2: 1 columns"),
    "an empty file": ("nc", "NC/xglue.nc.de.test", lambda s: " \n", "de.test: the file is empty"),
    "headings alone": ("pawsx", "PAWSX/de/test_2k.tsv", lambda s: s.split("\n")[0] + "\n", "test_2k.tsv: no example"),
    "half of a file": ("mlqa", "MLQA", lambda s: s[: len(s) // 2], "de.json:1: not JSON"),
    "another form": ("mlqa", "MLQA", lambda s: "[]", "de.json: SQuAD's form is expected"),
    "no question": ("mlqa", "MLQA", _mlqa(lambda p: p["qas"][1].pop("question")), r"qas\[1\]: 'question' is missing"),
    "no answer": ("mlqa", "MLQA", _mlqa(lambda p: p["qas"][1].update(answers=[])), "'where-de' has no answer"),
    "one id twice": ("mlqa", "MLQA", _mlqa(lambda p: p["qas"].append(p["qas"][0])), "id 'who-de' is there twice"),
    "an answer outside": (
        "mlqa", "MLQA", _mlqa(lambda p: p["qas"][0]["answers"][0].update(answer_start=10**4)), "answer_start 10000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_file_and_line(root, case):
    name, place, change, message = BROKEN[case]
    place = place if place != "MLQA" else "MLQA/MLQA_V1/test/test-context-de-question-de.json"
    _edit(root / place, change)
    with pytest.raises(ValueError, match=message) as error:
        load(TASKS[name], "de", "test", root)
    assert str(root / place) in str(error.value)
    load(TASKS[name], "de", "dev", root)


def test_missing_files_are_named_with_their_place(root, tmp_path):
    (root / "NER" / "nl.test").unlink()
    with pytest.raises(FileNotFoundError, match="NER/nl.test: no such file"):
        load(TASKS["ner"], "nl", "test", root)
    (root / "XNLI" / "sw.test").unlink()
    with pytest.raises(FileNotFoundError, match="XNLI/sw.test: no such file, and no xnli.test.tsv"):
        load(TASKS["xnli"], "sw", "test", root)
    with pytest.raises(FileNotFoundError, match="elsewhere/WPR: no such folder; root must be xglue_full_dataset"):
        load(TASKS["wpr"], "fr", "test", tmp_path / "elsewhere")
    (root / "POS" / "de.test").write_bytes(b"Stra\xdfe NOUN\n")
    with pytest.raises(ValueError, match="POS/de.test: not UTF-8"):
        load(TASKS["pos"], "de", "test", root)


def test_what_a_task_does_not_have_is_refused(root):
    with pytest.raises(ValueError, match="language 'sw': the test split of nc has en, de, es, fr, ru"):
        load(TASKS["nc"], "sw", "test", root)
    with pytest.raises(ValueError, match="language 'de': the train split of nc has en$"):
        load(TASKS["nc"], "de", "train", root)
    with pytest.raises(ValueError, match="split 'validation': must be one of train, dev, test"):
        load(TASKS["nc"], "en", "validation", root)
    with pytest.raises(ValueError, match="root: nc is a task of XGLUE.*sib200, ud-pos"):
        load(TASKS["nc"], "en", "test")
