"""SIB-200: which of seven topics is a sentence about? Has the same sentences in English and eight other languages."""

from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent / "data" / "sib200"
LABELS = ("entertainment", "geography", "health", "politics", "science/technology", "sports", "travel")
LANGUAGES = ("en", "de", "fr", "es", "ru", "zh", "ar", "hi", "sw")


@dataclass(frozen=True)
class Split:
    """One file as parallel lists: sentence numbers (the same in every language), label indices 0..6, texts."""

    sentences: list[int]
    labels: list[int]
    texts: list[str]


def load(language: str, split: str) -> Split:
    """Loads one file: ``load("en", "train")`` has 701 sentences, ``load(language, "test")`` 204. ValueError if not
    bundled.
    """
    path = DIRECTORY / f"{language}.{split}.tsv"
    if not path.is_file():
        bundled = ", ".join(sorted(path.name.removesuffix(".tsv") for path in DIRECTORY.glob("*.tsv")))
        raise ValueError(f"no SIB-200 file for language {language!r} and split {split!r}; bundled: {bundled}")
    # Cut at "\n" only: the texts have quotation marks that do not quote, and str.splitlines also cuts at U+2028.
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]]
    return Split([int(row[0]) for row in rows], [LABELS.index(row[1]) for row in rows], [row[2] for row in rows])
