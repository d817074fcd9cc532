"""Features and back: perfect logits give perfect scores, unless something was cut; then the rule says what is left."""

import random

import numpy as np
import official_xglue
import pytest
import torch
from lazy import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks.xglue.examples.kinds import SpanExample, TextExample, WordsExample
from benchmarks.xglue.examples.load import load
from benchmarks.xglue.models.features import IGNORED, collator, decode, encode
from benchmarks.xglue.scores import metrics, predictions
from benchmarks.xglue.tasks import TASKS

NER, POS, MLQA, QAM, SIB200 = (TASKS[name] for name in ("ner", "pos", "mlqa", "qam", "sib200"))
CHARACTERS = sorted(set(map(chr, range(33, 0x250))) | set("".join(map(official_xglue.text, POS.languages + ("sw",)))))


def xlmr_like():
    """As XLM-R's, every character a piece: the mark of a word's beginning always stands alone."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("▁", *CHARACTERS))]
    tokenizer = Tokenizer(models.Unigram(pieces, 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def bert_like():
    """As BERT's, at most two characters a piece; with token types."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CHARACTERS, *(f"##{c}" for c in CHARACTERS), "An", "##na", "##ie"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(params=[xlmr_like, bert_like], ids=["xlmr", "bert"])
def tokenizer(request):
    return request.param()


def perfect(task, features):
    """Logits that say what the labels say, with a little noise, padded as a Trainer pads them."""
    longest = max(len(feature["input_ids"]) for feature in features)
    noise = np.random.default_rng(0)
    if task.kind == "span":
        both = []
        for key in ("start_positions", "end_positions"):
            logits = noise.random((len(features), longest))
            for row, feature in zip(logits, features):
                row[feature[key]] += 9  # position 0, no token of the passage, where the answer is in another window
                row[len(feature["input_ids"]) :] = -100
            both.append(logits)
        return tuple(both)
    if task.kind == "token":
        logits = noise.random((len(features), longest, len(task.labels)))
        for row, feature in zip(logits, features):
            for place in np.flatnonzero(feature["labels"] != IGNORED):
                row[place, feature["labels"][place]] += 9
            row[len(feature["input_ids"]) :] = -100
        return logits
    logits = noise.random((len(features), len(task.labels)))
    for row, feature in zip(logits, features):
        row[feature["labels"]] += 9
    return logits


def predict(task, examples, tokenizer, max_length, stride=0):
    features = encode(task, examples, tokenizer, max_length, stride)
    assert max(len(feature["input_ids"]) for feature in features) <= max_length
    return decode(task, examples, features, perfect(task, features))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.official])
def test_perfect_logits_give_a_perfect_score(name, tokenizer, tmp_path):
    root = official_xglue.write(tmp_path / "data")
    task = TASKS[name]
    for language in task.languages:
        examples = load(task, language, "test", root)
        predicted = predict(task, examples, tokenizer, max_length=400, stride=32)
        predictions.write(tmp_path, task, language, predicted)
        assert predictions.read(tmp_path, task, language, examples) == predicted
        scores = metrics.score(task, language, examples, predicted)
        assert scores["official"] == 1
        predicted = predictions.read(tmp_path, task, language, examples)
        if task.kind == "sequence" or task.kind == "pair":
            wrong = [task.labels[task.labels.index(label) - 1] for label in predicted]
            assert metrics.score(task, language, examples, wrong)["official"] == 0


def random_words(rng, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(count)]


def test_a_label_stands_at_the_first_sub_word_of_its_word(tokenizer, seed):
    rng = random.Random(seed)
    sentences = [random_words(rng, rng.randint(1, 9)) for _ in range(20)]
    examples = [WordsExample(str(i), words, rng.choices(POS.labels, k=len(words))) for i, words in enumerate(sentences)]
    for example, feature in zip(examples, encode(POS, examples, tokenizer, max_length=200)):
        labelled = np.flatnonzero(feature["labels"] != IGNORED)
        first = [tokenizer.decode([feature["input_ids"][place]]) for place in labelled]
        assert [POS.labels[label] for label in feature["labels"][labelled]] == example.tags
        assert first == [word[0] for word in example.words]


def test_words_past_the_limit_are_predicted_by_the_evaluators_rule(tokenizer, seed):
    rng = random.Random(seed)
    words = random_words(rng, 30)
    examples = [
        WordsExample("long", words, rng.choices(POS.labels, k=30)),
        WordsExample("short", words[:2], ["ADJ", "X"]),
    ]
    long, short = predict(POS, examples, tokenizer, max_length=24)
    assert 3 <= len(long) < 30 and long == examples[0].tags[: len(long)] and short == ["ADJ", "X"]
    scores = metrics.score(POS, "en", examples, [long, short])
    assert scores["accuracy"] == pytest.approx((len(long) + 2) / 32)
    filled = [[*long, *["O"] * (30 - len(long))], short]
    assert scores == metrics.score(POS, "en", examples, filled) and scores["recall"] < 1


def test_a_word_without_sub_words_does_not_move_the_others(tokenizer):
    """One of them, " ", is nothing to BERT and no more than the mark of a beginning to XLM-R."""
    examples = [WordsExample("0", ["Anna", " ", "Wien", " "], ["B-PER", "B-ORG", "B-LOC", "B-ORG"])]
    assert predict(NER, examples, tokenizer, max_length=50) == [["B-PER", "O", "B-LOC"]]


def test_a_sentence_of_which_nothing_is_left_stays_a_sentence(tokenizer, tmp_path):
    examples = [WordsExample("0", [" "], ["O"]), WordsExample("1", ["Anna"], ["B-PER"])]
    predicted = predict(NER, examples, tokenizer, max_length=50)
    assert predicted == [[], ["B-PER"]]
    predictions.write(tmp_path, NER, "de", predicted)
    assert predictions.read(tmp_path, NER, "de", examples) == [["O"], ["B-PER"]]


def _question(rng, guid: str, count: int, length: int) -> SpanExample:
    """The answer: some of the many words of the passage."""
    words = [f"{word}{number}" for number, word in enumerate(random_words(rng, count))]
    first = rng.randrange(count - length)
    answer = " ".join(words[first : first + length])
    context = " ".join(words)
    return SpanExample(
        guid, "which words?", context, ((answer, len(" ".join(["", *words[:first]]).lstrip()) + (first > 0)),)
    )


def test_answers_are_found_in_every_window(tokenizer, seed):
    rng = random.Random(seed)
    examples = [_question(rng, str(i), rng.randint(5, 120), length=2) for i in range(30)]
    assert all(e.context[s : s + len(a)] == a for e in examples for a, s in e.answers)
    features = encode(MLQA, examples, tokenizer, max_length=90, stride=40)
    assert len(features) > 2 * len(examples)
    predicted = decode(MLQA, examples, features, perfect(MLQA, features))
    assert predicted == {example.guid: example.answers[0][0] for example in examples}
    assert metrics.score(MLQA, "en", examples, predicted)["exact_match"] == 1
    of_one = [feature for feature in features if feature["example"] == 0]
    assert {0} < {int(feature["start_positions"]) for feature in features}  # windows without the answer point at 0
    seen = {int(place) for feature in of_one for start, end in feature["offsets"] for place in range(start, end)}
    assert seen - {-1} >= {i for i, c in enumerate(examples[0].context) if c != " "}


def test_an_answer_may_begin_and_end_inside_of_a_word(tokenizer, seed):
    """As in scripts without spaces, where the sub-word before an answer ends at its first character."""
    rng = random.Random(seed)
    examples = []
    for number in range(20):
        context = "".join(rng.choices("abcdefgh", k=60))
        start = rng.randrange(1, 50)
        examples.append(SpanExample(str(number), "?", context, ((context[start : start + 7], start),)))
    predicted = predict(MLQA, examples, tokenizer, max_length=40, stride=12)
    assert predicted == {example.guid: example.answers[0][0] for example in examples}


def test_an_answer_longer_than_the_limit_is_not_found(tokenizer):
    answer = " ".join(["words"] * 12)
    example = SpanExample("q", "?", f"before {answer} after", ((answer, 7),))
    predicted = predict(MLQA, [example], tokenizer, max_length=200, stride=10)["q"]
    assert predicted != answer
    assert metrics.score(MLQA, "en", [example], {"q": predicted})["official"] < 1


def test_long_questions_are_cut_and_leave_room_for_the_passage(tokenizer):
    example = SpanExample("q", "why " * 300, "an old bridge", (("old", 3),))
    (feature,) = encode(MLQA, [example], tokenizer, max_length=128, stride=16)
    assert decode(MLQA, [example], [feature], perfect(MLQA, [feature])) == {"q": "old"}
    with pytest.raises(ValueError, match="stride 64: must be below"):
        encode(MLQA, [example], tokenizer, max_length=128, stride=64)


def test_pairs_are_cut_to_the_limit_and_keep_their_label(tokenizer):
    examples = [TextExample("0", "short", "long " * 200, "1"), TextExample("1", "word " * 90, "more " * 90, "0")]
    assert predict(QAM, examples, tokenizer, max_length=32) == ["1", "0"]


def test_one_text_is_encoded_alone_and_two_together(tokenizer):
    (alone,) = encode(SIB200, [TextExample("0", "ab", None, "sports")], tokenizer, max_length=32)
    (pair,) = encode(QAM, [TextExample("0", "ab", "cd", "1")], tokenizer, max_length=32)
    assert alone["input_ids"].tolist() == tokenizer("ab")["input_ids"]
    assert pair["input_ids"].tolist() == tokenizer("ab", "cd")["input_ids"]
    assert SIB200.labels[alone["labels"]] == "sports"
    assert ("token_type_ids" in pair) == ("token_type_ids" in tokenizer.model_input_names)


def test_batches_are_padded_to_their_longest(tokenizer):
    examples = [WordsExample("0", ["a"], ["O"]), WordsExample("1", ["abc", "d"], ["B-PER", "O"])]
    features = encode(NER, examples, tokenizer, max_length=50)
    batch = collator(NER, tokenizer)(features)
    assert set(batch) == {*tokenizer.model_input_names, "labels"}
    longest = len(features[1]["input_ids"])
    short = len(features[0]["input_ids"])
    assert all(tensor.shape == (2, longest) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert (batch["input_ids"][0, short:] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, short:] == IGNORED).all() and batch["attention_mask"][0].sum() == short
    spans = encode(MLQA, [SpanExample("q", "?", "an old bridge", (("old", 3),))], tokenizer, max_length=50)
    batch = collator(MLQA, tokenizer)(spans * 3)
    assert batch["start_positions"].shape == batch["end_positions"].shape == (3,) and "offsets" not in batch


def test_what_does_not_fit_is_refused(tokenizer):
    examples = [TextExample("0", "a", "b", "1"), TextExample("1", "a", "b", "0")]
    features = encode(QAM, examples, tokenizer, max_length=20)
    logits = perfect(QAM, features)
    with pytest.raises(ValueError, match="logits: 1 rows for 2 features"):
        decode(QAM, examples, features, logits[:1])
    with pytest.raises(ValueError, match="features: of 1 examples, 2 are given"):
        decode(QAM, examples, features[:1], logits[:1])
    with pytest.raises(ValueError, match="label 'yes' of 0: qam has 0, 1"):
        encode(QAM, [TextExample("0", "a", "b", "yes")], tokenizer, max_length=20)
    with pytest.raises(TypeError, match="tokenizer: a fast one"):
        encode(QAM, examples, object(), max_length=20)


def test_more_examples_than_are_encoded_at_once(tokenizer):
    examples = [TextExample(str(i), "a", "b", str(i % 2)) for i in range(1001)]
    features = encode(QAM, examples, tokenizer, max_length=20)
    assert [feature["example"] for feature in features] == list(range(1001))
    assert decode(QAM, examples, features, perfect(QAM, features)) == [example.label for example in examples]
