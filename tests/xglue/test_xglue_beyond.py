"""The study's methods beyond the paper: what they train, how they clip, and their table."""

import sys
from pathlib import Path

import pytest
import torch
from lazy import Lazy
from test_xglue_report import lines, write
from test_xglue_run import run, tiny

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common.results import text_of  # noqa: E402
from benchmarks.render import beyond_tables  # noqa: E402
from benchmarks.xglue.methods import BEYOND  # noqa: E402
from benchmarks.xglue.report.beyond import scores  # noqa: E402
from benchmarks.xglue.report.compare import compare  # noqa: E402
from benchmarks.xglue.runs import prepare  # noqa: E402

adapter, training = (Lazy(f"benchmarks.xglue.{name}") for name in ("models.adapter", "runs.trainer"))


def test_lora_trains_its_matrices_and_the_same_head(seed):
    pytest.importorskip("peft")
    source = prepare.prepare(tiny()).source
    models = [source.model(seed, 0.0) for _ in range(3)]
    before = torch.random.get_rng_state()
    for model, own in zip(models, (seed, seed, seed + 1)):
        adapter.add_lora(model, own)
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = (dict(model.named_parameters()) for model in models)
    trained = {name for name, param in first.items() if param.requires_grad}
    assert {name for name in first if "lora_" in name or name.startswith("classifier.")} == trained
    assert len(trained) == 3 * 2 * 2 + 2  # query and value of three blocks, two matrices each; the head
    assert all(torch.equal(param, again[name]) for name, param in first.items())
    assert {name.split(".")[-3] for name in first if not torch.equal(first[name], other[name])} == {"lora_A"}
    assert torch.equal(first["classifier.weight"], source.model(seed, 0.0).classifier.weight)


@pytest.mark.parametrize("method", BEYOND)
def test_a_run_of_each(method, seed, tmp_path):
    """15 steps: the second turn of the blocks begins with the twelfth."""
    if method == "lora":
        pytest.importorskip("peft")
    result = run(tiny(method=method, seed=seed % 1000, train_examples=80, epochs=3, lr=1e-2), tmp_path)
    losses = [loss for _, loss in result["losses"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    shares = [share for _, share in result["active_fraction"]]
    expected = {"lora": 1.0, "random-mask": 0.05, "sample-blocks": 2 / 3, "cycle-blocks": 1 / 3}[method]
    assert shares == pytest.approx([expected] * len(shares), abs=1e-3)
    assert result["parameters"]["masked"] == (0 if method == "lora" else 3 * 8_544)


@pytest.mark.parametrize("method, skips", [("cycle-blocks", True), ("gradfreeze-topdown", False), ("sft", False)])
def test_who_skips_and_who_clips(method, skips, tmp_path):
    """Blocks in turns have no gradients without a turn, and the optimizer clips; Trainer clips all others."""
    settings = tiny(method=method, epochs=1, max_grad_norm=1e-3)
    trainer = training.XglueTrainer(
        settings, prepare.prepare(settings), tmp_path, checkpoints=False, eval_batch_size=8, device="cpu",
        deterministic=False, progress=False,
    )  # fmt: skip
    seen = []

    def look(optimizer, *_):
        grads = {name: param.grad for name, param in trainer.model.named_parameters() if ".layer." in name}
        norm = sum(float(param.grad.square().sum()) for param in trainer.model.parameters() if param.grad is not None)
        seen.append((sum(grad is None for grad in grads.values()) / len(grads), norm**0.5))

    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(look)
    trainer.train()
    assert [missing for missing, _ in seen] == pytest.approx([2 / 3] * 3 if skips else [0] * 3)
    for _, norm in seen:
        assert (norm > 1e-2) if skips else norm == pytest.approx(1e-3, rel=1e-2)
    assert optimizer.max_grad_norm == (1e-3 if skips else None)


@pytest.fixture
def results(tmp_path):
    """English and German of three seeds; LoRA has only two, and another rate with a worse dev score."""
    for seed in range(3):
        write(tmp_path / "xglue", "sib200", "sft", seed, {"en": 0.80 + seed / 100, "de": 0.70})
        write(tmp_path / "xglue", "sib200", "gradfreeze-topdown", seed, {"en": 0.9, "de": 0.8})
        write(tmp_path / "xglue", "sib200", "graddrop", seed, {"en": 0.1, "de": 0.1})
        for method in BEYOND:
            if method != "lora" or seed < 2:
                write(
                    tmp_path / "xglue" / "beyond", "sib200", method, seed, {"en": 0.7, "de": 0.71 + seed / 50}, lr=5e-4
                )
    write(tmp_path / "xglue" / "beyond", "sib200", "lora", 0, {"en": 0.99, "de": 0.99}, dev=0.1, lr=1e-3)
    return tmp_path


def training_of(folder, **costs):
    """A file of benchmarks.cpu.training with (MiB, peak over full, time over full) by method."""
    rows = [
        {"method": name.replace("_", "-"), "peak_bytes": mib << 20, "peak_ratio": peak, "ratio": time}
        for name, (mib, peak, time) in costs.items()
    ]
    machine = {
        "cpu": "a made-up CPU", "cores": 2, "torch": "2.13.0", "commit": "b" * 40, "dirty": False,
        "kernels_older_than_csrc": False,
    }  # fmt: skip
    load = {"before": 0, "after": 0, "elsewhere": 0.0}
    (folder / "some-machine").mkdir()
    path = folder / "some-machine" / "training.json"
    path.write_text(text_of({"machine": machine, "quick": False, "load": load, "rows": rows}))


def test_scores_and_their_intervals(results):
    group, found = scores(results / "xglue")
    by_name = {score.method: score for score in found}
    assert list(by_name) == ["sft", *BEYOND, "gradfreeze-topdown"] == list(group.runs)
    sft, lora = by_name["sft"], by_name["lora"]
    # 80, 81, 82: sd 1, times t's 97.5 % of two degrees, 4.3027, over sqrt 3
    assert sft.english.difference == pytest.approx(81) and sft.english.high - 81 == pytest.approx(2.4841, abs=1e-3)
    assert sft.gain is None and lora.lr == 5e-4 and lora.others.n == lora.gain.n == 2
    assert lora.gain.difference == pytest.approx(2)  # 71 and 73 against 70
    assert by_name["gradfreeze-topdown"].gain.low == pytest.approx(10)


def test_the_tables(results):
    empty = beyond_tables.section(results / "nothing"), beyond_tables.summary(results / "nothing")
    assert all("No results yet" in text for text in empty)
    path = results / "one.md"
    path.write_text(beyond_tables.summary(results), encoding="utf-8")
    assert lines(path, "full fine-tuning")[0] == ["full fine-tuning", "3", "81.00 ± 2.48", "70.00 ± 0.00", "–", "–"]
    training_of(
        results, sft=(400, 1.0, 1.0), lora=(100, 0.25, 0.625), random_mask=(402, 1.005, 1.01),
        **{"sft, again": (404, 1.01, 0.98)},
    )  # fmt: skip
    path.write_text(beyond_tables.summary(results), encoding="utf-8")
    header = ["mean ± 95 %", "seeds", "English, %", "1 others, %", "peak memory", "time per step"]
    assert lines(path, header[0]) == [header]
    assert lines(path, "LoRA (PEFT), rank 8")[0][1:] == ["2", "70.00 ± 0.00", "72.00 ± 12.71", "0.25", "0.62"]
    assert len(path.read_text().strip().splitlines()) <= 10
    path.write_text(beyond_tables.section(results), encoding="utf-8")
    assert lines(path, "LoRA (PEFT), rank 8")[0][1:] == [
        "2", "0.0005", "70.00 ± 0.00", "72.00 ± 12.71", "+2.00 ± 12.71", "0.001: 99.00", "100", "0.25", "0.62",
    ]  # fmt: skip
    assert lines(path, "full fine-tuning")[0][-4:] == ["–", "400", "1.00", "1.00"]
    assert "a made-up CPU" in path.read_text() and "memory 1.01, time 0.98" in path.read_text()


def test_runs_of_other_settings_stand_beside_nothing(results):
    write(results / "other" / "beyond", "sib200", "lora", 0, {"en": 0.7, "de": 0.7}, p=0.5)
    (results / "xglue" / "sib200").rename(results / "other" / "sib200")
    with pytest.raises(ValueError, match="no run in .* has these settings"):
        scores(results / "other")


def test_a_study_of_them_is_compared_with_the_committed_runs(results):
    found = compare(results / "xglue" / "beyond", results / "xglue")
    assert found[-1].startswith("12 of 12 runs are in xglue: 0 with the same bits, 12 with the same test scores")
