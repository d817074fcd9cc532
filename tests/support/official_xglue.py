"""Makes a small xglue_full_dataset: nine tasks in all languages, from two sentences that were written for the tests."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.xglue.tasks import TASKS  # noqa: E402

# "Anna reads a book in Vienna." and "Anna!", and their tags; the first PROPN is the person, the second the place.
_SENTENCES = """
en|Anna reads a book in Vienna .|PROPN VERB DET NOUN ADP PROPN PUNCT
ar|تقرأ آنا كتابا في فيينا .|VERB PROPN NOUN ADP PROPN PUNCT
bg|Анна чете книга във Виена .|PROPN VERB NOUN ADP PROPN PUNCT
de|Anna liest ein Buch in Wien .|PROPN VERB DET NOUN ADP PROPN PUNCT
el|Η Άννα διαβάζει ένα βιβλίο στη Βιέννη .|DET PROPN VERB DET NOUN ADP PROPN PUNCT
es|Anna lee un libro en Viena .|PROPN VERB DET NOUN ADP PROPN PUNCT
fr|Anna lit un livre à Vienne .|PROPN VERB DET NOUN ADP PROPN PUNCT
hi|आना वियना में किताब पढ़ती है ।|PROPN PROPN ADP NOUN VERB AUX PUNCT
it|Anna legge un libro a Vienna .|PROPN VERB DET NOUN ADP PROPN PUNCT
nl|Anna leest een boek in Wenen .|PROPN VERB DET NOUN ADP PROPN PUNCT
pl|Anna czyta książkę w Wiedniu .|PROPN VERB NOUN ADP PROPN PUNCT
pt|Anna lê um livro em Viena .|PROPN VERB DET NOUN ADP PROPN PUNCT
ru|Анна читает книгу в Вене .|PROPN VERB NOUN ADP PROPN PUNCT
sw|Anna anasoma kitabu mjini Vienna .|PROPN VERB NOUN NOUN PROPN PUNCT
th|อันนา อ่าน หนังสือ ใน เวียนนา|PROPN VERB NOUN ADP PROPN
tr|Anna Viyana'da kitap okuyor .|PROPN PROPN NOUN VERB PUNCT
ur|آنا ویانا میں کتاب پڑھتی ہے ۔|PROPN PROPN ADP NOUN VERB AUX PUNCT
vi|Anna đọc sách ở Vienna .|PROPN VERB NOUN ADP PROPN PUNCT
zh|安娜 在 维也纳 读 书 。|PROPN ADP PROPN VERB NOUN PUNCT
"""


def sentence(language: str) -> tuple[list[str], list[str]]:
    """Returns words and tags."""
    own = next(line for line in _SENTENCES.splitlines() if line.startswith(f"{language}|"))
    return tuple(part.split() for part in own.split("|")[1:])


def names(language: str) -> tuple[str, str]:
    """Returns the person and the place."""
    words, tags = sentence(language)
    person, place = (word for word, tag in zip(words, tags) if tag == "PROPN")
    return person, place


def text(language: str) -> str:
    return " ".join(sentence(language)[0])


def _tagged(sentences: list[tuple[list[str], list[str]]]) -> str:
    return "".join("".join(f"{word} {tag}\n" for word, tag in zip(*own)) + "\n" for own in sentences)


def pos(language: str) -> list[tuple[list[str], list[str]]]:
    return [sentence(language), ([names(language)[0], "!"], ["PROPN", "PUNCT"])]


def ner(language: str) -> list[tuple[list[str], list[str]]]:
    """Makes sentences in which the person has a second name."""
    words, tags = sentence(language)
    person, place = names(language)
    both = []
    for word in words:
        both += [(word, "B-PER"), ("Berg", "I-PER")] if word == person else [(word, "B-LOC" if word == place else "O")]
    return [tuple(map(list, zip(*both))), ([person, "!"], ["B-PER", "O"])]


def _rows(rows: list[tuple]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def xnli(language: str) -> list[tuple]:
    person, place = names(language)
    whole = text(language)
    return [(whole, person, "entailment"), (whole, f"{place}?", "neutral"), (whole, f"{person} ≠", "contradiction")]


def wpr(language: str) -> list[tuple]:
    """Makes three runs: a query with three pages, one with two, and the first query again with one."""
    person, place = names(language)
    whole = text(language)
    return [
        (place, whole, person, "4"), (place, person, whole, "0"), (place, "!", person, "2"),
        (person, whole, place, "1"), (person, place, whole, "3"), (place, "?", whole, "4"),
    ]  # fmt: skip


def mlqa(language: str) -> dict:
    """Makes one paragraph with two questions. The second has two answers."""
    person, place = names(language)
    context = f"{text(language)} {person}!"
    answers = {
        f"who-{language}": [{"text": person, "answer_start": context.index(person)}],
        f"where-{language}": [
            {"text": place, "answer_start": context.index(place)},
            {"text": f"{place}", "answer_start": context.rindex(place)},
        ],
    }
    qas = [{"id": key, "question": f"{key[:3]}?", "answers": value} for key, value in answers.items()]
    return {"data": [{"title": place, "paragraphs": [{"context": context, "qas": qas}]}]}


def _file(task: str, language: str) -> str:
    person, place = names(language)
    whole = text(language)
    if task == "xnli":
        return _rows(xnli(language))
    if task == "pawsx":
        return _rows([("id", "sentence1", "sentence2", "label"), ("7", whole, whole, "1"), ("8", whole, place, "0")])
    if task == "nc":
        return _rows([(place, whole, "travel"), (person, f"{whole} “{person}”", "sports")])
    if task == "qadsm":
        return _rows([(place, whole, person, "Good"), (person, place, whole, "Bad"), (place, place, place, "Good")])
    if task == "wpr":
        return _rows(wpr(language))
    if task == "qam":
        return _rows([(f"{place}?", whole, "1"), (f"{person}?", place, "0")])
    if task == "ner":
        return "-DOCSTART- -X- -X- O\n\n" + _tagged(ner(language))
    if task == "pos":
        return _tagged(pos(language))
    return json.dumps(mlqa(language), ensure_ascii=False)


def _train(task: str) -> str:
    if task != "xnli":
        return _file(task, "en")
    header = ("premise", "hypo", "label")
    return _rows([header, *((a, b, c.replace("contradiction", "contradictory")) for a, b, c in xnli("en"))])


_PLACES = {
    "xnli": ("multinli.train.en.tsv", "{language}.{split}"),
    "pawsx": ("en/train.tsv", "{language}/{split}_2k.tsv"),
    "mlqa": ("squad1.1/train-v1.1.json", "MLQA_V1/{split}/{split}-context-{language}-question-{language}.json"),
    "ner": ("en.train", "{language}.{split}"),
    "pos": ("en.train", "{language}.{split}"),
    **{
        name: (f"xglue.{name}.en.train", f"xglue.{name}.{{language}}.{{split}}")
        for name in ("nc", "qadsm", "wpr", "qam")
    },
}


def write(root: Path) -> Path:
    """Writes the folder and returns it."""
    for name, (train, other) in _PLACES.items():
        task = TASKS[name]
        files = {train: _train(name)}
        for split in ("dev", "test"):
            files |= {other.format(language=own, split=split): _file(name, own) for own in task.languages}
        for place, contents in files.items():
            target = root / task.folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(contents, encoding="utf-8")
    return root
