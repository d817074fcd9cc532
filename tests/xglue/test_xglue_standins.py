"""The stand-ins: what is in them, that nothing is in two splits, and that the archives are what they say."""

import gzip
import random
from collections import Counter

import official_xglue  # noqa: F401  (makes benchmarks importable)
import pytest

from benchmarks.xglue.examples import standins
from benchmarks.xglue.examples.load import load
from benchmarks.xglue.examples.pack import pack, unpack
from benchmarks.xglue.tasks import TASKS, languages

STAND_INS = {name: task for name, task in TASKS.items() if not task.official}
SIZES = {
    "sib200": (701, [99], [204]),
    "ud-pos": (12543, [2002, 799, 1400, 1476, 718], [2077, 977, 426, 416, 596, 601, 498, 800, 500]),
    "uner": (3569, [509], [1000]),
    "nusax": (500, [100], [400]),
    "xquad": (784, [128], [278]),
    "xquad-match": (2 * 784, [2 * 128], [2 * 278]),
    "xquad-rank": (5 * 784, [5 * 128], [5 * 278]),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_every_language_is_there_and_only_its_labels(name):
    task = TASKS[name]
    train, dev, test = SIZES[name]
    for split, sizes in (("train", [train]), ("dev", dev), ("test", test)):
        own = languages(task, split)
        sizes = sizes * len(own) if len(sizes) == 1 else sizes
        for language, size in zip(own, sizes, strict=True):
            examples = load(task, language, split)
            assert len(examples) == len({example.guid for example in examples}) == size
            if task.kind == "token":
                assert {tag for example in examples for tag in example.tags} <= set(task.labels)
                assert all(len(example.words) == len(example.tags) > 0 for example in examples)
            elif task.kind != "span":
                assert {example.label for example in examples} == set(task.labels)


def test_answers_stand_where_the_data_say():
    task = TASKS["xquad"]
    for language in task.languages:
        for split in ("dev", "test"):
            for example in load(task, language, split):
                for text, start in example.answers:
                    assert example.context[start : start + len(text)] == text


def test_no_article_of_xquad_is_in_two_splits():
    for language in TASKS["xquad"].languages:
        own = {split: standins.articles(language, split) for split in ("train", "dev", "test")}
        assert [len(own[split]) for split in own] == [30, 6, 12]
        titles = [article["title"] for articles in own.values() for article in articles]
        contexts = [p["context"] for articles in own.values() for article in articles for p in article["paragraphs"]]
        assert len(set(titles)) == 48 and len(set(contexts)) == len(contexts) == 240
    english = {split: {a["title"] for a in standins.articles("en", split)} for split in ("train", "dev", "test")}
    for language in TASKS["xquad"].languages:
        for split, titles in english.items():
            assert {article["title"] for article in standins.articles(language, split)} == titles


@pytest.mark.parametrize("name", ["xquad", "xquad-match", "xquad-rank", "sib200", "nusax"])
def test_splits_are_disjoint_and_languages_parallel(name):
    task = TASKS[name]
    splits = {split: {example.guid for example in load(task, "en", split)} for split in ("train", "dev", "test")}
    if name != "nusax":  # its numbers begin anew in every split
        assert sum(map(len, splits.values())) == len(set().union(*splits.values()))
    english = load(task, "en", "test")
    for language in task.languages[1:]:
        own = load(task, language, "test")
        assert [example.guid for example in own] == [example.guid for example in english]
        if task.kind != "span" and name != "nusax":
            assert [example.label for example in own] == [example.label for example in english]


def test_training_and_development_sentences_of_uner_are_apart():
    task = TASKS["uner"]
    train, dev, test = (load(task, "en", split) for split in ("train", "dev", "test"))
    assert len(train) + len(dev) == 2001 + 2077
    assert not {e.guid for e in train} & {e.guid for e in dev}
    assert not {tuple(e.words) for e in train} & {tuple(e.words) for e in test if len(e.words) > 5}


def test_a_question_is_matched_with_its_own_and_another_paragraph_of_the_article(seed):
    spans = {example.guid: example for example in load(TASKS["xquad"], "ru", "test")}
    article_of = {
        paragraph["context"]: article["title"]
        for article in standins.articles("ru", "test")
        for paragraph in article["paragraphs"]
    }
    examples = load(TASKS["xquad-match"], "ru", "test")
    for own, other in zip(examples[::2], examples[1::2]):
        span = spans[own.guid.rsplit("-", 1)[0]]
        assert (own.text, own.pair, own.label) == (other.text, span.context, "1") == (span.question, own.pair, "1")
        assert other.label == "0" and other.pair != own.pair and article_of[other.pair] == article_of[own.pair]
    distance = Counter(
        (int(b.guid.rsplit("-", 1)[1]) - int(a.guid.rsplit("-", 1)[1])) % 5
        for a, b in zip(examples[::2], examples[1::2])
    )
    assert set(distance) == {1, 2, 3, 4}
    assert random.Random(seed).choice(examples).group is None


def test_a_question_is_ranked_with_all_paragraphs_of_its_article():
    spans = {example.guid: example for example in load(TASKS["xquad"], "th", "dev")}
    runs = {}
    for example in load(TASKS["xquad-rank"], "th", "dev"):
        runs.setdefault(example.group, []).append(example)
    assert list(runs) == list(spans)
    for group, run in runs.items():
        assert len({example.pair for example in run}) == 5 and {example.text for example in run} == {
            spans[group].question
        }
        assert [example.pair for example in run if example.label == "1"] == [spans[group].context]


def test_what_a_stand_in_does_not_have_is_refused():
    with pytest.raises(ValueError, match="language 'ru': the dev split of ud-pos has en, de, es, fr, nl"):
        load(TASKS["ud-pos"], "ru", "dev")
    with pytest.raises(ValueError, match="language 'de': the train split of xquad has en$"):
        load(TASKS["xquad"], "de", "train")


def test_loading_twice_gives_lists_of_ones_own():
    first = load(TASKS["uner"], "de", "test")
    first[0].words.append("more")
    assert load(TASKS["uner"], "de", "test")[0].words != first[0].words


def test_archives_are_small_named_by_their_licences_and_without_times():
    archives = sorted(standins.DIRECTORY.glob("*.tar.gz"))
    assert len(archives) == 6 and sum(path.stat().st_size for path in archives) < 5_000_000
    licences = (standins.DIRECTORY / "LICENSES.md").read_text(encoding="utf-8")
    for path in archives:
        assert f"`{path.name}`" in licences
        packed = path.read_bytes()
        assert packed[4:8] == bytes(4)  # gzip's time
        again = pack(unpack(packed), level=0)
        assert gzip.decompress(again) == gzip.decompress(packed)  # the compressed bytes are zlib's affair


def test_packing_does_not_depend_on_the_order(seed):
    rng = random.Random(seed)
    files = {f"{i}/{rng.random()}": rng.randbytes(rng.randint(0, 900)) for i in range(9)}
    shuffled = rng.sample(list(files.items()), 9)
    assert pack(dict(shuffled)) == pack(files) and unpack(pack(files)) == files
