"""Computes the official evaluator's numbers, 0..1, and plain ones beside.

The rules are those of microsoft/XGLUE's evaluation/xglue_evaluate.py with the seqeval of its time (before 1.0). Where
they are not what one would expect:

- A sentence with fewer predicted tags than words is filled up with "O". Sentences are then concatenated, with one "O"
  between them. Surplus tags are not cut, and would shift all that follows.
- POS is the precision of chunks of equal tags, not the accuracy of tags: neighbours of one tag are one chunk, unless
  the tag begins with B, S or E (SCONJ, SYM). seqeval 1.2.2 takes the type of a tag from its second letter on, so that
  X and O are one type there, and gives other numbers. For IOB2 tags, so for NER, the two agree.
- WPR is the nDCG (scikit-learn's: linear gains, all ranks, ties averaged) of the predicted class, not of a score, over
  runs of consecutive equal queries. A query with one document is left out, one with none that is relevant counts 0.
- An unanswered question counts 0. Case, punctuation and articles are ignored; each language has its own articles.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from ..examples.kinds import Example, SpanExample, TextExample
from ..tasks import Task

_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "\\sال^|ال",
}
# Languages whose answers are compared by character. Thai is our addition: MLQA lacks it, and it has no spaces either.
_CHARACTERS = {"zh": "[\u4e00-\u9fa5]", "th": "[\u0e00-\u0e7f]"}


def score(task: Task, language: str, examples: Sequence[Example], predictions) -> dict[str, float]:
    """Returns {"official": the evaluator's number, ...}, all 0..1.

    Beside it: for labels "accuracy" and "f1" (of the second of two labels, else the mean over the labels that occur);
    for tags "accuracy" (of words), and "precision", "recall", "f1" of chunks; for answers "f1" and "exact_match".

    Raises:
        ValueError: not as many predictions as examples; a ranking without any query of two documents.
    """
    if task.kind == "span":
        result = answer_scores(language, examples, predictions)
        return {"official": result["f1"], **result}
    if len(predictions) != len(examples):
        raise ValueError(f"predictions: {len(predictions)} for {len(examples)} examples of {task.name} {language}")
    if task.kind == "token":
        result = chunk_scores([example.tags for example in examples], predictions)
        return {"official": result["f1" if task.metric == "chunk_f1" else "precision"], **result}
    result = label_scores(task, [example.label for example in examples], predictions)
    if task.kind == "ranking":
        result = {"ndcg": ndcg(examples, predictions), **result}
    return {"official": result[task.metric], **result}


def label_scores(task: Task, gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Returns accuracy and F1: of the second of two labels, else the mean of the F1 of the labels in gold or
    predicted.
    """
    pairs = Counter(zip(gold, predicted))
    of_gold, of_predicted = Counter(gold), Counter(predicted)
    f1 = {
        label: 2 * pairs[label, label] / (of_gold[label] + of_predicted[label])
        # sorted, as the sum of floats below must not depend on the order of a set, which differs between processes.
        for label in sorted({*gold, *predicted, *(task.labels if len(task.labels) == 2 else ())})
        if of_gold[label] + of_predicted[label]
    }
    accuracy = sum(count for (a, b), count in pairs.items() if a == b) / len(gold)
    return {
        "accuracy": accuracy,
        "f1": f1.get(task.labels[1], 0.0) if len(task.labels) == 2 else sum(f1.values()) / len(f1),
    }


def chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns (type, first, last) of the chunks, by the rules of seqeval before 1.0.

    These use a tag's first letter, and its type: what follows the last "-", or all of it. A chunk ends before anything
    after S or E; before B, S or O after B or I; before another type after anything but O and ".". It begins with B or
    S; with E or I after O, S or E; with another type, unless the tag is O or ".".
    """
    found, begin = set(), 0
    before, before_type = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        letter, kind = tag[0], tag.split("-")[-1]
        other = before_type != kind
        if before in "ES" or (before in "BI" and letter in "BSO") or (before not in "O." and other):
            found.add((before_type, begin, place - 1))
        if letter in "BS" or (letter in "EI" and before in "OES") or (letter not in "O." and other):
            begin = place
        before, before_type = letter, kind
    return found


def chunk_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the accuracy of words, and precision, recall and F1 of chunks, 0 if there are none."""
    filled = [[*ours, *["O"] * (len(tags) - len(ours))] for tags, ours in zip(gold, predicted)]
    wanted = chunks([tag for sentence in gold for tag in (*sentence, "O")])
    found = chunks([tag for sentence in filled for tag in (*sentence, "O")])
    right = len(wanted & found)
    equal = sum(a == b for tags, ours in zip(gold, filled) for a, b in zip(tags, ours))
    return {
        "accuracy": equal / sum(map(len, gold)),
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(wanted) if wanted else 0.0,
        "f1": 2 * right / (len(wanted) + len(found)) if wanted or found else 0.0,
    }


def ndcg(examples: Sequence[TextExample], predicted: Sequence[str]) -> float:
    """Returns the mean over the runs of one query of the nDCG of the predicted classes, as numbers."""
    from sklearn.metrics import ndcg_score

    values = []
    for _, run in groupby(zip(examples, predicted), key=lambda pair: pair[0].group):
        gold, ours = zip(*((float(example.label), float(label)) for example, label in run))
        if len(gold) > 1:
            values.append(ndcg_score([gold], [ours]))
    if not values:
        raise ValueError("examples: no query has two documents, so that there is no ranking to score")
    return float(np.mean(values))


def normalise(answer: str, language: str) -> list[str]:
    """Returns the tokens to compare, by MLQA's rules. In languages that MLQA lacks no articles are removed."""
    text = "".join(c for c in answer.lower() if not _is_punctuation(c))
    if language in _ARTICLES:
        text = re.sub(_ARTICLES[language], " ", text)
    if language in _CHARACTERS:
        text = re.sub(f"({_CHARACTERS[language]})", r" \1 ", text)
    return text.split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def answer_scores(language: str, examples: Sequence[SpanExample], predicted: dict[str, str]) -> dict[str, float]:
    """Returns F1 of tokens and exact match: of the best answer to a question, and the mean over the questions."""
    f1 = exact = 0.0
    for example in examples:
        if example.guid not in predicted:
            continue
        ours = normalise(predicted[example.guid], language)
        golds = [normalise(text, language) for text, _ in example.answers]
        f1 += max(_token_f1(ours, gold) for gold in golds)
        exact += ours in golds
    return {"f1": f1 / len(examples), "exact_match": exact / len(examples)}


def _token_f1(ours: list[str], gold: list[str]) -> float:
    common = sum((Counter(ours) & Counter(gold)).values())
    return 2 * common / (len(ours) + len(gold)) if common else 0.0
