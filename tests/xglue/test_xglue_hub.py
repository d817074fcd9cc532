"""Hugging Face's XGLUE, made in memory: the same examples as from the official folder, whatever the names of fields."""

import official_xglue
import pytest

from benchmarks.xglue import hub
from benchmarks.xglue.data import load
from benchmarks.xglue.tasks import TASKS

datasets = pytest.importorskip("datasets")
from datasets import ClassLabel, Dataset, Features, Sequence, Value  # noqa: E402

IOB = TASKS["ner"].labels[::-1]  # the hub's order of names need not be ours
TEXT = Value("string")
# Features of the configs as in the loader's source, its misspelt keys included, in the order of the official columns.
FORMS = {
    "xnli": {
        "premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
    },
    "pawsx": {"sentence1": TEXT, "sentence2": TEXT, "label": ClassLabel(names=["different", "same"])},
    "nc": {"news_title": TEXT, "news_body": TEXT, "news_category": TEXT},
    "qadsm": {
        "query": TEXT, "ad_title": TEXT, "ad_description": TEXT, "relevance_label": ClassLabel(names=["Bad", "Good"]),
    },
    "wpr": {
        "query": TEXT, "wed_page_title": TEXT, "web_page_snippet": TEXT,
        "relavance_label": ClassLabel(names=["Bad", "Fair", "Good", "Excellent", "Perfect"]),
    },
    "qam": {"question": TEXT, "annswer": TEXT, "label": ClassLabel(names=["False", "True"])},
    "ner": {"words": Sequence(TEXT), "ner": Sequence(ClassLabel(names=list(IOB)))},
    "pos": {"words": Sequence(TEXT), "pos": Sequence(TEXT)},
    "mlqa": {"context": TEXT, "question": TEXT, "answers": Sequence({"answer_start": Value("int32"), "text": TEXT})},
}  # fmt: skip
THEIRS = {
    "pawsx": {"0": "different", "1": "same"},
    "qam": {"0": "False", "1": "True"},
    "wpr": dict(zip("01234", ["Bad", "Fair", "Good", "Excellent", "Perfect"])),
}


def dataset(name: str, language: str, root) -> Dataset:
    """The official file of a language as the hub's loader gives it."""
    task = TASKS[name]
    features = Features(FORMS[name])
    rows = []
    for example in load(task, language, "test", root):
        if task.kind == "token":
            rows.append({"words": example.words, name: example.tags})
        elif task.kind == "span":
            texts, starts = zip(*example.answers)
            answers = {"answer_start": list(starts), "text": list(texts)}
            rows.append({"context": example.context, "question": example.question, "answers": answers})
    if not rows:
        path = root / task.folder / official_file(task, language)
        lines = path.read_text(encoding="utf-8").splitlines()[name == "pawsx" :]
        columns = [line.split("\t")[name == "pawsx" :] for line in lines]
        for row in columns:
            row[-1] = THEIRS.get(name, {}).get(row[-1], row[-1])
            rows.append(dict(zip(features, row)))
    return Dataset.from_list(rows, features=features)


def official_file(task, language: str) -> str:
    if task.name in ("xnli", "pawsx"):
        return f"{language}.test" if task.name == "xnli" else f"{language}/test_2k.tsv"
    return f"xglue.{task.name}.{language}.test"


@pytest.mark.parametrize("name", FORMS)
def test_examples_are_those_of_the_official_folder(name, tmp_path, monkeypatch):
    root = official_xglue.write(tmp_path)
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return dataset(name, "de", root)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]

    def without_guid(examples):
        return [{key: value for key, value in vars(example).items() if key != "guid"} for example in examples]

    found = load(task, "de", "test", "hub")
    assert without_guid(found) == without_guid(load(task, "de", "test", root))
    assert len({example.guid for example in found}) == len(found)
    load(task, "de", "dev", "hub:somebody/copy")
    load(task, "en", "train", "hub")
    config = "paws-x" if name == "pawsx" else name
    assert asked == [
        (hub.NAME, config, "test.de"),
        ("somebody/copy", config, "validation.de"),
        (hub.NAME, config, "train"),
    ]


def test_a_missing_field_a_wrong_label_and_no_rows_are_named():
    task = TASKS["nc"]
    rows = {"news_title": ["a"], "news_body": ["b"], "news_category": ["weather"]}
    with pytest.raises(ValueError, match="the hub's nc, test-0: label 'weather': nc has foodanddrink"):
        hub.examples(task, "test", Dataset.from_dict(rows))
    with pytest.raises(ValueError, match="the hub's nc has no field 'news_body', it has news_title, news_category"):
        hub.examples(task, "test", Dataset.from_dict({key: rows[key] for key in ("news_title", "news_category")}))
    with pytest.raises(ValueError, match="the hub's nc test is empty"):
        hub.examples(task, "test", Dataset.from_dict({key: [] for key in rows}))
