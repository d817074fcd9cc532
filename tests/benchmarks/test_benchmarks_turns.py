"""The benchmark of blocks trained in turns runs end to end, sees whether a run resumes, has a table and a figure."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import run_well

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.common import peers, turns  # noqa: E402
from benchmarks.common.results import load  # noqa: E402
from benchmarks.cpu import sampled_blocks  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402

EVERY, SAVED_AT = 2, 3


@pytest.fixture
def plan(seed, tmp_path, one_thread):
    """Of a model of 4 blocks with random weights."""
    from transformers import BertConfig, BertModel

    from graddrop_kernels.demo.classifier import MeanPoolingClassifier

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    model = MeanPoolingClassifier(BertModel(config, add_pooling_layer=False), 7)
    shape = (2, 5)
    batches = [
        ({"input_ids": torch.randint(20, shape), "attention_mask": torch.ones(shape)}, torch.randint(7, shape[:1]))
        for _ in range(SAVED_AT + EVERY)
    ]
    torch.save((model, batches), tmp_path / "work")
    return turns.Plan(tmp_path / "work", EVERY, seed % 2**31, 1, None)


def runs(name, plan, saved):
    """The run that is not interrupted, the one that goes on from its file, and the most that the optimizer kept."""
    whole, kept = sampled_blocks.Run(name, plan, None), []
    for number in range(len(whole.batches)):
        if number == SAVED_AT:
            whole.save(saved)
        kept.append(whole.step()["kept"])
    resumed = sampled_blocks.Run(name, plan, saved)
    for _ in range(EVERY):
        resumed.step()
    return whole, resumed, max(kept)


@pytest.mark.parametrize("name", [name for name, (_, kind, _) in turns.WAYS.items() if kind != "check"])
def test_a_resume_in_the_middle_of_a_period(name, plan, tmp_path):
    """Ours and full fine-tuning have the bits of a run that was not interrupted, the peers have not."""
    peer, kind, count = turns.WAYS[name]
    if peers.unavailable(peer):
        pytest.skip(f"{name}: {peers.unavailable(peer)}")
    whole, resumed, kept = runs(name, plan, tmp_path / "saved")
    assert whole.number == resumed.number == len(whole.batches)
    assert (whole.digest() == resumed.digest()) == (kind == "ours" or count is None)
    computed = sampled_blocks.computed_bytes(whole.model, count)
    if kind == "ours" or count is None:
        assert kept == computed
    elif name == "BAdam":  # what LISA keeps depends on its draws
        assert kept > computed


def test_ours_and_lisa_train_so_many_blocks(plan):
    for name, (peer, _, count) in turns.WAYS.items():
        if peers.unavailable(peer) is not None or count is None:
            continue
        run = sampled_blocks.Run(name, plan, None)
        for _ in range(EVERY):
            before = [param.detach().clone() for param in run.model.parameters()]
            run.step()
            moved = {
                key.split(".")[3] if key.startswith(turns.LAYERS) else key.split(".")[0]
                for (key, param), old in zip(run.model.named_parameters(), before)
                if not torch.equal(param, old)
            }
            assert len(moved - {"bert", "classifier"}) == count and {"bert", "classifier"} <= moved, (name, moved)


def test_lisas_class_comes_from_the_checkout(plan, tmp_path):
    path = tmp_path / "lmflow" / turns.CALLBACK
    path.parent.mkdir(parents=True)
    path.write_text(
        "class DynamicLayerActivationCallback:\n"
        "    def __init__(self, n_layers, interval_steps, model, lisa_layers_attribute):\n"
        "        self.model = model\n"
        "        self.seen = [n_layers, interval_steps, len(eval('self.' + lisa_layers_attribute))]\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        self.seen.append(state.global_step)\n"
        "        self.model.seen = self.seen\n"
    )
    own = turns.Plan(plan.work, EVERY, plan.seed, 1, tmp_path / "lmflow")
    run = sampled_blocks.Run("LISA", own, None)
    run.step(), run.step()
    assert run.model.seen == [turns.SAMPLED, EVERY, 4, 0, 1]
    assert turns.lisa_callback(None) is turns.LisaStyle
    blob = subprocess.run(["git", "hash-object", path], capture_output=True, text=True)
    assert blob.returncode or blob.stdout.startswith(turns.git_blob(path.read_bytes()))
    assert turns.git_blob(b"") == hashlib.sha1(b"blob 0\0").hexdigest()[:12]


def test_a_missing_peer_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "badam", None)  # as if not installed, whether or not it is
    assert peers.unavailable(turns.WAYS["BAdam"][0]) == "not installed"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of the resident memory")
@pytest.mark.parametrize("at_once", [True, False])
def test_memory_that_is_freed_is_given_back(at_once):
    """In a process of its own, whose allocator otherwise keeps freed tensors between those that stay."""
    own = """
import torch
from benchmarks.common import resident
torch.set_num_threads(1)
if {}:
    resident.return_at_once()
for _ in range(3):
    freed, stay = [], []
    for _ in range(100):
        freed.append(torch.ones(1 << 18)), stay.append(torch.ones(1 << 8))
    before = resident.start_peak()
    freed.clear()
print(before - resident.resident("VmRSS"))
"""
    process = subprocess.run([sys.executable, "-c", own.format(at_once)], cwd=ROOT, capture_output=True, text=True)
    assert (int(process.stdout) > 90 << 20) == at_once, process


@pytest.mark.slow
def test_every_way_is_measured_and_shown(tmp_path):
    run_well("cpu.sampled_blocks", "--quick", "--out", tmp_path / "some-machine")
    result = json.loads((tmp_path / "some-machine" / "sampled_blocks.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == turns.WAYS.keys()
    text = render.section("sampled-blocks", "some-machine", load(tmp_path))
    assert "a quick run, no measurement" in text and "LISA is LISA-style" in text
    for name, row in rows.items():
        peer, kind, count = turns.WAYS[name]
        if reason := peers.unavailable(peer):
            assert row["error"] == reason and f"| {name}: {reason} |" in text
            continue
        assert len(row["losses"]) == len(row["kept"]) == row["repetitions"] == result["steps"]
        assert row["kept_bytes"] == max(row["kept"]) <= rows["full fine-tuning"]["kept_bytes"]
        assert kind != "ours" or row["kept_bytes"] == row["computed_bytes"]
        assert row["same_bits"] == (kind == "ours" or count is None), name
        assert f"| {name} | {row['ratio']:.2f} (" in text and f" | {row['kept_bytes'] / 1e6:.1f} (" in text
        assert ("| yes |" if row["same_bits"] else "| **no** |") in text.partition(f"| {name} |")[2].split("\n")[0]
    if Path("/proc/self/clear_refs").exists():
        whole, ours = rows["full fine-tuning"], rows["SampleBlocks(2)"]
        # gradients of idle blocks are saved besides
        assert whole["peak_bytes"] - ours["peak_bytes"] > whole["kept_bytes"] - ours["kept_bytes"]
    drawn = run_well("render.figures", "--results", tmp_path).splitlines()
    assert drawn == [str(tmp_path / "some-machine" / "sampled_blocks.png")]
