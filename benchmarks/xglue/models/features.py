"""Converts examples to a model's inputs, and its outputs to predictions.

Words and tags: only the first sub-word of a word carries its label. Some tokenizers make the mark of a word's beginning
a sub-word of its own, as XLM-R often does in Chinese and Thai. Then the next sub-word carries the label, as Unicoder
drops such marks there. Words past max_length get no tag, and the evaluator fills up with "O". A word that the tokenizer
drops altogether gets "O" in its place.

Questions and passages: a question keeps its first 64 sub-words, a passage is cut into windows that overlap. An answer
that is not whole in a window is labelled at the first token there. The predicted answer is the span of at most 30
sub-words with the largest sum of logits in any window. SQuAD's scripts search the same with an n-best list.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from ..examples.kinds import Example, SpanExample, TextExample, WordsExample
from ..tasks import Task

IGNORED = -100  # ignored by torch's cross entropy
QUESTION_LENGTH, ANSWER_LENGTH = 64, 30
_TARGETS = ("labels", "start_positions", "end_positions")
_WORD_BEGIN = "\u2581"
_AT_ONCE = 1000  # examples at a time; a tokenizer's own result takes far more memory than our features


def encode(task: Task, examples: Sequence[Example], tokenizer, max_length: int, stride: int = 0) -> list[dict]:
    """Makes features for ``transformers.Trainer``, dicts of ints and int32 arrays: one per example, more for a long
    passage.

    They hold input_ids, attention_mask and token_type_ids if the tokenizer makes them; labels (start_positions and
    end_positions for spans); "example", the index of the example; and what decode() needs, which collator() leaves out.

    Args:
        tokenizer: a fast tokenizer of transformers (``is_fast``).
        max_length: sub-words of an input, special ones included.
        stride: sub-words that two windows of a long passage share; used for spans only.

    Raises:
        TypeError: a slow tokenizer.
        ValueError: no room for a passage beside question and stride; a label that the task does not have.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer: a fast one is needed, which knows where its sub-words are; got {type(tokenizer)}")
    make = {"token": _words, "span": partial(_spans, stride=stride)}.get(task.kind, _texts)
    features = []
    for start in range(0, len(examples), _AT_ONCE):
        for feature in make(task, examples[start : start + _AT_ONCE], tokenizer, max_length):
            feature["example"] += start
            features.append(feature)
    return features


def collator(task: Task, tokenizer) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Returns a function: features -> a batch of int64 tensors, padded on the right to its longest feature."""
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": IGNORED}

    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        batch = {}
        for key in (*tokenizer.model_input_names, *_TARGETS):
            if key not in features[0]:
                continue
            rows = [np.asarray(feature[key]) for feature in features]
            if rows[0].ndim:
                rows = [np.pad(row, (0, longest - len(row)), constant_values=fill.get(key, 0)) for row in rows]
            batch[key] = torch.from_numpy(np.stack(rows).astype(np.int64))
        return batch

    return collate


def decode(task: Task, examples: Sequence[Example], features: Sequence[dict], logits):
    """Returns predictions: a label per example (list[str]); for token tasks a list of tags per example
    (list[list[str]]), shorter than the words if the sentence was cut; for spans {guid: answer} (dict[str, str]).

    Args:
        logits: as ``Trainer.predict(...).predictions``: arrays (features, labels), (features, positions, labels), or
            for spans a pair (features, positions), of starts and ends.

    Raises:
        ValueError: not as many logits as features, or an example without a feature.
    """
    parts = [np.asarray(part) for part in logits] if task.kind == "span" else [np.asarray(logits)]
    for part in parts:
        if len(part) != len(features):
            raise ValueError(f"logits: {len(part)} rows for {len(features)} features; nothing may be left out")
    if (found := {feature["example"] for feature in features}) != set(range(len(examples))):
        raise ValueError(f"features: of {len(found)} examples, {len(examples)} are given; encode these examples")
    if task.kind == "span":
        return _answers(examples, features, *parts)
    if task.kind == "token":
        return [_tags(task, feature["positions"], rows.argmax(-1)) for feature, rows in zip(features, parts[0])]
    return [task.labels[index] for index in parts[0].argmax(-1)]


def _inputs(tokenizer, encoded, row: int) -> dict:
    names = [name for name in tokenizer.model_input_names if name in encoded]
    return {name: np.asarray(encoded[name][row], dtype=np.int32) for name in names}


def _label(task: Task, label: str, example: Example) -> int:
    if label not in task.labels:
        raise ValueError(f"label {label!r} of {example.guid}: {task.name} has {', '.join(task.labels)}")
    return task.labels.index(label)


def _texts(task: Task, examples: Sequence[TextExample], tokenizer, max_length: int) -> Iterator[dict]:
    texts = [example.text for example in examples]
    pairs = [example.pair or "" for example in examples] if examples[0].pair is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    for row, example in enumerate(examples):
        yield {
            **_inputs(tokenizer, encoded, row),
            "labels": _label(task, example.label, example),
            "example": row,
        }


def _words(task: Task, examples: Sequence[WordsExample], tokenizer, max_length: int) -> Iterator[dict]:
    sentences = [example.words for example in examples]
    encoded = tokenizer(sentences, is_split_into_words=True, truncation=True, max_length=max_length)
    for row, example in enumerate(examples):
        inputs = _inputs(tokenizer, encoded, row)
        positions = np.full(len(example.words), -1, dtype=np.int32)
        labels = np.full(len(inputs["input_ids"]), IGNORED, dtype=np.int32)
        for place, (word, token) in enumerate(zip(encoded.word_ids(row), encoded.tokens(row))):
            if word is not None and positions[word] < 0 and token != _WORD_BEGIN:
                positions[word] = place
                labels[place] = _label(task, example.tags[word], example)
        yield {**inputs, "labels": labels, "example": row, "positions": positions}


def _tags(task: Task, positions: np.ndarray, classes: np.ndarray) -> list[str]:
    seen = np.flatnonzero(positions >= 0)
    positions = positions[: seen[-1] + 1] if len(seen) else positions[:0]
    return [task.labels[classes[place]] if place >= 0 else "O" for place in positions]


def _spans(task: Task, examples: Sequence[SpanExample], tokenizer, max_length: int, stride: int) -> Iterator[dict]:
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    question_length = min(QUESTION_LENGTH, max_length // 2)
    if max_length - question_length - specials <= stride:
        raise ValueError(
            f"stride {stride}: must be below {max_length - question_length - specials}, what max_length {max_length}"
            f" leaves for the passage beside {question_length} sub-words of the question"
        )
    questions = [_first(tokenizer, example.question, question_length) for example in examples]
    encoded = tokenizer(
        questions,
        [example.context for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for row, index in enumerate(encoded["overflow_to_sample_mapping"]):
        example = examples[index]
        inputs = _inputs(tokenizer, encoded, row)
        in_context = np.array([part == 1 for part in encoded.sequence_ids(row)])
        offsets = np.asarray(encoded["offset_mapping"][row], dtype=np.int32)
        offsets[~in_context] = -1
        start, end = _place(example, offsets, in_context)
        yield {**inputs, "start_positions": start, "end_positions": end, "example": index, "offsets": offsets}


def _first(tokenizer, question: str, length: int) -> str:
    """Cuts the question after its first sub-words, without leading spaces, which would count as sub-words."""
    question = question.lstrip()
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= length else question[: offsets[length - 1][1]]


def _place(example: SpanExample, offsets: np.ndarray, in_context: np.ndarray) -> tuple[int, int]:
    """Returns first and last sub-word of the first answer; (0, 0) unless all of it is in this window."""
    text, start = example.answers[0]
    stop = start + len(text)
    inside = np.flatnonzero(in_context & (offsets[:, 1] > start) & (offsets[:, 0] < stop))
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < stop:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def _answers(
    examples: Sequence[SpanExample], features: Sequence[dict], starts: np.ndarray, ends: np.ndarray
) -> dict[str, str]:
    best = {}
    for feature, start, end in zip(features, starts, ends):
        offsets = feature["offsets"]
        allowed = np.flatnonzero(offsets[:, 0] >= 0)
        if not len(allowed):
            continue
        begin, stop = allowed[0], allowed[-1] + 1
        start, end = start[begin:stop].astype(np.float64), end[begin:stop].astype(np.float64)
        for length in range(min(ANSWER_LENGTH, stop - begin)):
            sums = start[: len(start) - length] + end[length:]
            first = int(sums.argmax())
            index = feature["example"]
            if index not in best or sums[first] > best[index][0]:
                best[index] = (sums[first], offsets[begin + first, 0], offsets[begin + first + length, 1])
    answers = {}
    for index, example in enumerate(examples):
        _, begin, stop = best.get(index, (0, 0, 0))
        answers[example.guid] = example.context[begin:stop].strip()
    return answers
