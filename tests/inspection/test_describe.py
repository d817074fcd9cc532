"""describe() tells what the steps do; it and the pictures change nothing; the pictures of the guide."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import (
    BLOCK_POLICIES,
    POLICIES,
    Encoder,
    build,
    every_policy,
    half,
    random_grads,
    snapshot,
    state_bits,
    train,
    warned,
)

import graddrop_kernels
from graddrop_kernels import (
    FusedGradDropAdamW,
    GradDrop,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    backends,
    describe,
    plot_mask,
    plot_schedule,
)
from graddrop_kernels.groups.names import join_names
from graddrop_kernels.masks.bitmask import count_kept

ROOT = Path(graddrop_kernels.__file__).resolve().parent.parent


def cells(optimizer):
    """The rows of the table: {first cell: {column: cell}}."""
    lines = describe(optimizer).splitlines()
    header = re.split(r" {2,}", lines[0])
    count = 1 + len(optimizer.param_groups)
    rows = [re.split(r" {2,}", line) for line in lines[1 : 1 + count]]
    return {row[0]: dict(zip(header, row)) for row in rows}


def lines_of(optimizer, start):
    return [line for line in describe(optimizer).splitlines() if line.startswith(start)]


# describe(): the table.


@every_policy
def test_the_table_has_what_the_groups_have(policy, seed):
    model, optimizer = build(policy, Encoder(blocks=5), lr=0.0125, seed=seed)
    train(optimizer, model.parameters(), range(6), seed)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    table = cells(optimizer)
    names = ["0 blocks", "1 blocks_no_decay", "2 dense", "3 dense_no_decay"]
    assert list(table) == [*names, "total"]
    kept_of_all = 0
    for name, group, fraction in zip(names, optimizer.param_groups, optimizer.active_fraction(), strict=True):
        row, params = table[name], group["params"]
        numel = sum(param.numel() for param in params)
        kept_of_all += fraction * numel
        assert row["tensors"] == str(len(params)) and row["parameters"] == f"{numel:,}"
        assert row["blocks"] == ("5" if "blocks" in name else "-")
        assert row["lr"] == ("0.5" if name == names[1] else "0.0125")
        assert row["weight decay"] == ("0" if "no_decay" in name else "0.1")
        assert float(row["active now"].rstrip("%")) == pytest.approx(100 * fraction, rel=1e-3)
        mask = POLICIES[policy](model) if "blocks" in name else None
        assert row["policy"].split("(")[0] == (type(mask).__name__ if mask else "None: plain AdamW")
        assert row["dropped"] == ((mask.masked if mask else None) or "-")
    everything = sum(param.numel() for param in model.parameters())
    assert table["total"]["parameters"] == f"{everything:,}" and table["total"]["tensors"] == "23"
    total = re.search(r"^total +5 .* ([\d.]+)%$", describe(optimizer), re.MULTILINE)
    assert float(total[1]) == pytest.approx(100 * kept_of_all / everything, rel=1e-3)
    assert lines_of(optimizer, "position") == [
        f"position (group 0, 1, 2, 3): epoch 1, 6 completed steps, seed {seed}"
    ]


def test_columns_are_aligned():
    _, optimizer = build("layer")
    lines = describe(optimizer).splitlines()[:6]
    for column in ("blocks", "tensors", "parameters", "lr", "weight decay", "active now"):
        end = re.search(rf"\b{column}\b", lines[0]).end()
        for line in lines[1:]:
            assert line[end : end + 2].strip() == "" and line[end - 1 : end] != "", (column, line)
    assert len({line.index(word) for line, word in zip(lines, ("policy", "LayerGradDrop", "LayerGradDrop"))}) == 1


def test_the_meaning_of_dropped_is_the_groups_where_it_says_so():
    _, optimizer = build("graddrop", masked="frozen")
    assert cells(optimizer)["0 blocks"]["dropped"] == "frozen"
    _, optimizer = build("freeze", masked="gradient")
    assert cells(optimizer)["0 blocks"]["dropped"] == "gradient"


def test_a_callable_is_named_without_its_address():
    text = describe(build("graddrop-callable")[1])
    assert half.__name__ in text and "0x" not in text


@pytest.mark.parametrize("policy", BLOCK_POLICIES)
def test_active_blocks_are_those_that_the_masks_keep(policy, seed):
    model, optimizer = build(policy, Encoder(blocks=7), seed=seed)
    for step in range(9):
        optimizer.set_epoch(step // 3)
        kept = [i for i in range(7) if optimizer.mask(f"layer.{i}.linear.weight").all()]
        (line,) = lines_of(optimizer, "active blocks (group 0, 1): ")
        names = join_names([f"layer.{i}" for i in kept]) or "none"
        assert line.removeprefix("active blocks (group 0, 1): ") == f"{len(kept)} of 7: {names}"
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()


def test_a_group_a_block_tells_of_its_own_block_only():
    model = Encoder(blocks=3)
    groups = [{"params": list(block.named_parameters(f"layer.{i}"))} for i, block in enumerate(model.layer)]
    optimizer = FusedGradDropAdamW(groups, mask=GradFreeze(epochs=3, layers=["layer.*"]))
    optimizer.set_epoch(1)
    assert [row["blocks"] for row in cells(optimizer).values()] == ["1", "1", "1", "3"]
    assert [row["active now"] for row in list(cells(optimizer).values())[:3]] == ["0%", "100%", "100%"]
    assert lines_of(optimizer, "active") == [
        "active blocks (group 0): 0 of 1: none",
        "active blocks (group 1): 1 of 1: layer.1",
        "active blocks (group 2): 1 of 1: layer.2",
    ]


def test_blocks_of_a_late_group_are_those_of_its_own_steps(seed):
    """A block's draw is its group's own count of steps: one that joins after 7 steps is that much behind."""
    model, late = Encoder(blocks=24), Encoder(blocks=24)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=LayerGradDrop(p=0.5, layers="layer.*"), seed=seed)
    train(optimizer, model.parameters(), range(7), seed)
    new = [named for i, block in enumerate(late.layer, 24) for named in block.named_parameters(f"layer.{i}")]
    optimizer.add_param_group({"params": new})
    for index, numbers in enumerate((range(24), range(24, 48))):
        names = [f"layer.{i}" for i in numbers]
        kept = [name for name in names if optimizer.mask(f"{name}.norm.weight").all()]
        (line,) = lines_of(optimizer, f"active blocks (group {index}): ")
        assert line == f"active blocks (group {index}): {len(kept)} of 24: {join_names(kept)}"


@pytest.mark.parametrize(
    "names, text",
    [
        ([], ""),
        (["a.0", "a.1", "a.2"], "a.0-2"),
        (["a.0", "a.2", "a.3", "a.9", "a.10"], "a.0, 2-3, 9-10"),
        (["encoder.block.1", "decoder.block.1", "decoder.block.2"], "encoder.block.1; decoder.block.1-2"),
        (["first", "second"], "first; second"),
        (["layer10", "layer11"], "layer10; layer11"),
        (["0", "1", "4"], "0-1, 4"),
    ],
)
def test_names_of_blocks_in_short(names, text):
    assert join_names(names) == text


# describe(): the unusual.


def test_empty_groups_names_missing_and_tensors_without_gradients():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    optimizer = FusedGradDropAdamW([{"params": []}, {"params": model.parameters()}], mask=GradDrop(p=LinearAnneal(4)))
    rows = [line.split() for line in describe(optimizer).splitlines()[1:4]]
    assert rows[0][:7] == ["0", "-", "0", "0", "0.001", "0.01", "-"]
    assert rows[1][:4] == ["1", "-", "4", "23"] and rows[2] == ["total", "-", "4", "23", rows[1][6]]
    assert rows[1][6] == "10%"
    assert lines_of(optimizer, "note (group 1): 1 tensors have requires_grad=False")
    assert lines_of(optimizer, "note (group 0, 1): the policy follows epochs, but set_epoch(epoch)")
    optimizer.set_epoch(0)
    assert not lines_of(optimizer, "note (group 0, 1): ")
    nothing = describe(FusedGradDropAdamW([{"params": []}]))
    assert re.search(r"^total +- +0 +0 +-$", nothing, re.MULTILINE)


def test_groups_at_different_positions_have_lines_of_their_own(seed):
    model, optimizer = build("graddrop")
    train(optimizer, model.parameters(), range(5), seed)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))], "seed": 5})
    assert lines_of(optimizer, "position") == [
        "position (group 0, 1, 2, 3): epoch 1, 5 completed steps, seed 11",
        "position (group 4): epoch 1, 0 completed steps, seed 5",
    ]


@pytest.mark.parametrize("stepped", [False, True])
def test_backends_are_those_of_the_step(stepped, monkeypatch):
    monkeypatch.delenv("GRADDROP_BACKEND", raising=False)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in dtypes]
    optimizer = FusedGradDropAdamW(params, moment_dtype=torch.float32)
    used, select = [], backends.select
    if stepped:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    told = [line.rpartition(": ")[2] for line in lines_of(optimizer, "backend")]
    monkeypatch.setattr(backends, "select", lambda *question: used.append(select(*question)) or used[-1])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.reloaded()  # else what was prepared with the first step serves
    optimizer.step()
    assert told == [backend.name for backend in used[-3:]] and told[2] == "reference"
    assert "(1 tensors on cpu, bfloat16, moments float32)" in lines_of(optimizer, "backend")[1]


def test_a_backend_that_cannot_step_is_told_with_the_reason(monkeypatch):
    weight = nn.Parameter(torch.ones(3))
    optimizer = FusedGradDropAdamW([weight])
    for name, told in (("exact", "exact"), ("no-such", "none: GRADDROP_BACKEND='no-such' is unknown")):
        monkeypatch.setenv("GRADDROP_BACKEND", name)
        assert f"moments float32): {told}" in describe(optimizer)
    monkeypatch.delenv("GRADDROP_BACKEND")
    monkeypatch.setattr(backends, "BACKENDS", ())
    assert "none: no backend takes float32" in describe(optimizer)


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000, 32 * (1 << 18) + 5])
def test_kept_bits_are_counted(numel, seed):
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert count_kept(graddrop_kernels.masks.bitmask.pack(bits)) == int(bits.sum())


# Telling changes nothing.


@every_policy
def test_looking_changes_nothing(policy, seed):
    looked, plain = build(policy, seed=seed), build(policy, seed=seed)
    for start in range(0, 9, 3):
        before, random = snapshot(looked[1]), torch.get_rng_state()

        def look():
            text = looked[1].describe()
            plot_mask(looked[1])
            plot_schedule(None if policy == "rows" else POLICIES[policy](looked[0]), 3)
            assert looked[1].describe() == text == describe(looked[1])

        assert warned(look) == []
        assert snapshot(looked[1]) == before and torch.equal(torch.get_rng_state(), random)
        for model, optimizer in (looked, plain):
            train(optimizer, model.parameters(), range(start, start + 3), seed)
    assert state_bits(*looked) == state_bits(*plain)


# matplotlib.


@pytest.mark.parametrize(
    "draw", ["plot_schedule(GradDrop(), 2)", "plot_mask(FusedGradDropAdamW([Parameter(ones(3))]))"]
)
def test_without_matplotlib_the_error_names_the_remedy(draw):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from torch import ones; from torch.nn import Parameter; "
        f"from graddrop_kernels import *; {draw}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf"ImportError: {draw.split('(')[0]}\(\) needs matplotlib .*: pip install matplotlib", last)


def test_pictures_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; from torch import ones; from torch.nn import Parameter; from graddrop_kernels import *; "
        "plot_schedule(GradFreeze(epochs=3), 3, 'schedule.svg'); "
        "plot_mask(FusedGradDropAdamW([Parameter(ones(3))]), 'masks.png'); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "TkAgg"}}  # a display's
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **settings)
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "schedule.svg").read_text()


# What the guide shows.


def test_the_script_of_the_guides_pictures(tmp_path):
    command = [sys.executable, "-m", "benchmarks.render.mask_pictures", "--folder", str(tmp_path / "new")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [Path(line).name for line in result.stdout.splitlines()] == ["masks.png", "schedule.png"]
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in result.stdout.splitlines())
