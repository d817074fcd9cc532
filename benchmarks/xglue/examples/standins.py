"""Tasks whose data may be redistributed, from the archives in benchmarks/xglue/data (sources, licences: LICENSES.md
there).

- sib200: the topic of a sentence, as NC. The splits are SIB-200's own; sentences are parallel in 22 languages.
- ud-pos: the official POS task itself, rebuilt from Universal Dependencies 2.5, in nine of its 18 languages: those
  whose rebuilt test data reproduces official scores. English training data is EWT alone; the official file has more.
- uner: named entities. English training and development data are Universal NER's development and test files of EWT,
  every eighth sentence for development, since its training file could not be had; tests are the parallel PUD sentences.
- nusax: the sentiment of a text, in English, Indonesian and ten languages with few resources. NusaX's own splits.
- xquad: the answer in a paragraph. XQuAD has 48 articles, the same in all languages and in one order. Article i goes to
  the split that i % 8 gives: 0 to 4 train (English only), 5 dev, 6 and 7 test. So no article or paragraph is in two.
- xquad-match: made from xquad, does the paragraph answer the question? Each question comes with its own paragraph ("1")
  and then with another of the same article ("0"), chosen in turn by the number of the question.
- xquad-rank: made from xquad, each question with all paragraphs of its article in their order, "1" for its own.
"""

import csv
import io
import json
from functools import lru_cache
from pathlib import Path

from ..tasks import Task, check
from .kinds import Example, TextExample, WordsExample
from .official import checked_label, lines, spans, words
from .pack import unpack

DIRECTORY = Path(__file__).parents[1] / "data"
_NUSAX = {
    "en": "english",
    "id": "indonesian",
    "ace": "acehnese",
    "ban": "balinese",
    "bbc": "toba_batak",
    "bjn": "banjarese",
    "bug": "buginese",
    "jv": "javanese",
    "mad": "madurese",
    "min": "minangkabau",
    "nij": "ngaju",
    "su": "sundanese",
}


def load(task: Task, language: str, split: str) -> list[Example]:
    """Returns the examples in the order of the file. In parallel sets the n-th examples of all languages correspond."""
    check(task, language, split)
    if task.name.startswith("xquad"):
        return _xquad(task, language, split)
    return {"sib200": _sib200, "ud-pos": _ud_pos, "uner": _uner, "nusax": _nusax}[task.name](task, language, split)


def _read(archive: str, name: str) -> str:
    return _files(archive)[name].decode("utf-8")


@lru_cache(maxsize=1)
def _files(archive: str) -> dict[str, bytes]:
    return unpack((DIRECTORY / f"{archive}.tar.gz").read_bytes())


def _sib200(task: Task, language: str, split: str) -> list[TextExample]:
    name = f"{language}.{split}.tsv"
    rows = [line.split("\t") for line in lines(_read("sib200", name))[1:]]
    return [TextExample(index, text, None, checked_label(task, label, name)) for index, label, text in rows]


def _ud_pos(task: Task, language: str, split: str) -> list[WordsExample]:
    name = f"{language}.{split}"
    return words(task, split, _read("ud-pos", name), name)


def _uner(task: Task, language: str, split: str) -> list[WordsExample]:
    if split == "test":
        name = "en_pud.test" if language == "en" else f"{language}.test"
        return words(task, split, _read("uner", name), name)
    english = [e for part in ("dev", "test") for e in words(task, f"ewt-{part}", _read("uner", f"en.{part}"), part)]
    return [e for number, e in enumerate(english) if (number % 8 == 7) == (split == "dev")]


def _nusax(task: Task, language: str, split: str) -> list[TextExample]:
    name = f"{_NUSAX[language]}.{'valid' if split == 'dev' else split}.csv"
    rows = csv.DictReader(io.StringIO(_read("nusax", name), newline=""))
    return [TextExample(row["id"], row["text"], None, checked_label(task, row["label"], name)) for row in rows]


def split_of(article: int) -> str:
    """Returns the split of the article at this index in XQuAD's files."""
    return ("train", "train", "train", "train", "train", "dev", "test", "test")[article % 8]


def articles(language: str, split: str) -> list[dict]:
    """Returns XQuAD's articles of a split, in SQuAD's form."""
    every = json.loads(_read("xquad", f"xquad.{language}.json"))["data"]
    return [article for place, article in enumerate(every) if split_of(place) == split]


def _xquad(task: Task, language: str, split: str) -> list[Example]:
    own = articles(language, split)
    if task.kind == "span":
        return spans(json.dumps({"data": own}), f"xquad.{language}.json")
    return [example for article in own for example in _pairs(task, article)]


def _pairs(task: Task, article: dict) -> list[TextExample]:
    """Pairs questions with paragraphs of their article."""
    contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
    asked = [(p, qa) for p, paragraph in enumerate(article["paragraphs"]) for qa in paragraph["qas"]]
    examples = []
    for number, (own, qa) in enumerate(asked):
        other = (own + 1 + number % (len(contexts) - 1)) % len(contexts)
        for shown in range(len(contexts)) if task.kind == "ranking" else (own, other):
            group = qa["id"] if task.kind == "ranking" else None
            guid, label = f"{qa['id']}-{shown}", "1" if shown == own else "0"
            examples.append(TextExample(guid, qa["question"], contexts[shown], label, group))
    return examples
