"""The study's methods beyond the paper: what they train, how they clip, and their table."""

import statistics
import sys
from pathlib import Path

import pytest
import torch
from lazy import Lazy
from test_xglue_report import lines, write
from test_xglue_run import run, tiny

from graddrop_kernels import FusedGradDropAdamW, GradDrop

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common.results import text_of  # noqa: E402
from benchmarks.render import beyond_tables  # noqa: E402
from benchmarks.xglue.methods import BEYOND, SAVING  # noqa: E402
from benchmarks.xglue.report.beyond import gain, scores  # noqa: E402
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
    expected = {"lora": 1.0, "random-mask": 0.05, "sample-blocks": 2 / 3, "cycle-blocks": 1 / 3}
    if method == "skip-update":  # tensors of several sizes
        assert len(set(shares)) > 5 and 0.2 < statistics.mean(shares) < 0.8
    else:
        wanted = 0.8 if method.startswith("graddrop") else expected.get(method, 1.0)
        assert shares == pytest.approx([wanted] * len(shares), abs=1e-3)
    assert result["parameters"]["masked"] == (0 if method == "lora" else 3 * 8_544)


def optimizer_of(method, folder):
    """The optimizer of a run of one epoch, and the trainer that has run it."""
    settings = tiny(method=method, epochs=1, weight_decay=0.25, head_lr_factor=4.0)
    trainer = training.XglueTrainer(
        settings, prepare.prepare(settings), folder, checkpoints=False, eval_batch_size=8, device="cpu",
        deterministic=False, progress=False,
    )  # fmt: skip
    return trainer.create_optimizer(), trainer, settings


@pytest.mark.parametrize("method", ["graddrop-update", "graddrop-cautious", "skip-update", "graddrop"])
def test_arguments_of_a_method(method, tmp_path):
    optimizer, _, _ = optimizer_of(method, tmp_path)
    masked = {"graddrop-update": "update"}.get(method)
    for group in optimizer.param_groups:
        assert (group["masked"], group["cautious_weight_decay"]) == (masked, method == "graddrop-cautious")


@pytest.mark.parametrize("method", ["graddrop-sgd", "graddrop-muon"])
def test_other_optimizers(method, tmp_path):
    """In the same scope: blocks are masked by the same bits; the head has its own rate, vectors no weight decay."""
    optimizer, trainer, settings = optimizer_of(method, tmp_path)
    names = {param: name for name, param in trainer.model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert group["lr"] == settings.lr * (4 if "classifier" in names[param] else 1)
            assert group["weight_decay"] == (0.25 if param.dim() > 1 else 0)
            found[names[param]] = group
    assert found.keys() == set(names.values())
    of_muon = {name for name, group in found.items() if "ns_steps" in group}
    assert of_muon == {n for n in found if method.endswith("muon") and ".layer." in n and n.endswith("weight")
                       and "LayerNorm" not in n}  # fmt: skip
    before = {name: param.detach().clone() for param, name in names.items()}
    masks = []
    inner = getattr(optimizer, "optimizer", optimizer)
    # After attach_mask's own hook: the gradients that the optimizer sees.
    inner.register_step_pre_hook(
        lambda *_: masks.append({n: p.grad != 0 for p, n in names.items() if n in (of_muon or found)})
    )
    trainer.train()
    assert all(not torch.equal(param, before[name]) for param, name in names.items() if "word" not in name)
    masked = {name for name in masks[0] if ".layer." in name and before[name].dim() == 2}
    twin = FusedGradDropAdamW(
        [(name, torch.nn.Parameter(before[name])) for name in masked], mask=GradDrop(0.2), seed=settings.seed
    )
    for step, kept in enumerate(masks):
        for name in masked:
            expected = twin.mask(name, step=step)
            assert not (kept[name] & ~expected).any() and kept[name].float().mean() > 0.95 * expected.float().mean()


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
    group, found = scores(results / "xglue", SAVING, "gradfreeze-topdown")
    by_name = {score.method: score for score in found}
    assert list(by_name) == ["sft", *SAVING, "gradfreeze-topdown"] == list(group.runs)
    sft, lora = by_name["sft"], by_name["lora"]
    # 80, 81, 82: sd 1, times t's 97.5 % of two degrees, 4.3027, over sqrt 3
    assert sft.english.difference == pytest.approx(81) and sft.english.high - 81 == pytest.approx(2.4841, abs=1e-3)
    assert lora.lr == 5e-4 and lora.others.n == gain(group, "lora", "sft").n == 2
    assert gain(group, "lora", "sft").difference == pytest.approx(2)  # 71 and 73 against 70
    assert gain(group, "gradfreeze-topdown", "sft").low == pytest.approx(10)


def test_the_tables(results):
    for table in beyond_tables.TABLES.values():
        assert "No results yet" in table(results / "nothing")
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


def test_the_table_of_updates(results):
    path = results / "one.md"
    path.write_text(beyond_tables.updates(results), encoding="utf-8")
    cells = ["70.00 ± 0.00", "73.00 ± 4.97", "+3.00 ± 4.97", "–"]
    assert lines(path, "GradDrop on Muon")[0][1:] == ["3", "0.0005", *cells, "+63.00 ± 4.97"]  # 71, 73, 75 against 10
    assert lines(path, "full fine-tuning")[0][-3:] == ["–", "–", "+60.00 ± 0.00"]
    assert [line.split("|")[1].strip() for line in path.read_text().splitlines() if "± " in line] == [
        "full fine-tuning", "SkipUpdate, half of the tensors", 'GradDrop, masked="update"', "GradDrop, cautious decay",
        "GradDrop on SGD with momentum", "GradDrop on Muon", "GradDrop",
    ]  # fmt: skip


def test_methods_without_runs_leave_a_table_out(results):
    for path in (results / "xglue" / "beyond").rglob("graddrop-sgd-*.json"):
        path.unlink()
    assert "No results yet" in beyond_tables.updates(results) and "LoRA" in beyond_tables.summary(results)


def test_runs_of_other_settings_stand_beside_nothing(results):
    write(results / "other" / "beyond", "sib200", "lora", 0, {"en": 0.7, "de": 0.7}, p=0.5)
    (results / "xglue" / "sib200").rename(results / "other" / "sib200")
    with pytest.raises(ValueError, match="no run in .* has these settings"):
        scores(results / "other", ["lora"], "graddrop")


def test_a_study_of_them_is_compared_with_the_committed_runs(results):
    found = compare(results / "xglue" / "beyond", results / "xglue")
    runs = 3 * len(BEYOND)
    assert found[-1].startswith(f"{runs} of {runs} runs are in xglue: 0 with the same bits, {runs} with the same test")
