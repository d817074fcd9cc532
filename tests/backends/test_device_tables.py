"""DeviceTables: what is launched, and what is copied, for a batch. On CPU tensors: nothing here needs a GPU."""

import ctypes
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from graddrop_kernels.backends import capture, device_tables
from graddrop_kernels.backends.batch import Hyper, TensorBatch
from graddrop_kernels.backends.device_tables import CHUNK, DeviceTables
from graddrop_kernels.backends.tensor_table import HyperRow, TensorRow, hyper_table
from graddrop_kernels.backends.upload import Upload
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock

KEEP, OFF, FROZEN_OFF = MaskPlan("keep"), MaskPlan("off"), MaskPlan("off", frozen=True)
DROP = MaskPlan("bernoulli", threshold=13107, scale=1.25)
AGES = MaskPlan("bucket", frozen=True, buckets=5, first_bucket=0, last_bucket=2, ages=(9, 4, 1))
PLANES = MaskPlan("bucket", frozen=True, buckets=5, first_bucket=0, last_bucket=2, bitpacked=True, ages=(9, 4, 1))
FIXED, NOISE = MaskPlan("fixed", frozen=True), MaskPlan("gaussian", scale=0.5)


def batch_of(sizes, plans=(DROP,), rows=None, amsgrad=(), shifted=(), layouts=None) -> TensorBatch:
    """One tensor a size; ``rows[i]`` is its hyper row, ``shifted`` lists those whose gradient lies off by one."""
    batch = TensorBatch(torch.device("cpu"), torch.float32, torch.float32)
    for i, size in enumerate(sizes):
        new = lambda shift=0, size=size: torch.zeros(size + 16)[shift : shift + size]
        for tensors in (batch.params, batch.exp_avgs, batch.exp_avg_sqs):
            tensors.append(new())
        batch.grads.append(new(1 if i in shifted else 0))
        batch.max_exp_avg_sqs.append(new() if i in amsgrad else None)
        batch.steps.append(torch.zeros(()))
        batch.keys.append(i)
        batch.layouts.append(layouts[i] if layouts else RowBlock.whole(size))
        batch.mask_words.append(None)
        batch.hyper_rows.append(rows[i] if rows else 0)
    batch.hypers = [Hyper(1e-3, 0.9, 0.99, 1e-8, 0.1, False, False, plan) for plan in plans]
    return batch


def refreshed(batch: TensorBatch) -> DeviceTables:
    return DeviceTables.of(batch)


def chunks(launch) -> list[tuple[int, int]]:
    """(tensor, number of the chunk)."""
    return [(int(chunk) >> 40, int(chunk) & (2**40 - 1)) for chunk in launch.chunks]


def test_every_element_is_in_one_chunk():
    sizes = [1, CHUNK - 1, CHUNK, CHUNK + 1, 0, 5 * CHUNK + 7]
    (launch,) = refreshed(batch_of(sizes)).launches
    expected = [(i, chunk) for i, size in enumerate(sizes) for chunk in range(-(-size // CHUNK))]
    assert chunks(launch) == expected
    assert launch.aligned and not launch.rows and not launch.frozen and not launch.ages and not launch.amsgrad


@pytest.mark.parametrize("tensors", [1, 400, 4000])
def test_one_launch_whatever_the_number_of_tensors(tensors):
    batch = batch_of([3] * tensors, (DROP, KEEP), [i % 2 for i in range(tensors)])
    assert len(refreshed(batch).launches) == 1


@pytest.mark.parametrize(
    "plans, kinds",
    [
        ((KEEP, KEEP), ["keep"]),
        ((KEEP, OFF), ["keep"]),
        ((DROP, KEEP), ["bernoulli"]),
        ((KEEP, NOISE), ["gaussian"]),
        ((AGES, KEEP), ["bucket"]),
        ((PLANES, KEEP), ["bucket", "keep"]),  # a row without planes has none to read
        ((FIXED, KEEP), ["fixed", "keep"]),
        ((DROP, OFF), ["bernoulli", "keep"]),  # the gradient of a dropped block is not read
        ((DROP, NOISE), ["bernoulli", "gaussian"]),
        ((DROP, FROZEN_OFF), ["bernoulli"]),
        ((FROZEN_OFF, FROZEN_OFF), []),
    ],
    ids=str,
)
def test_rows_that_can_share_a_launch_do(plans, kinds):
    tables = refreshed(batch_of([10, 20, 30, 40], plans, [0, 1, 0, 1]))
    assert [launch.kind for launch in tables.launches] == kinds
    walked = sorted(tensor for launch in tables.launches for tensor, _ in chunks(launch))
    assert walked == [i for i in range(4) if plans[i % 2] is not FROZEN_OFF]
    if kinds[:1] == ["bucket"]:
        bucket = tables.launches[0]
        assert bucket.frozen and bucket.ages and bucket.planes == (3 if plans[0] is PLANES else -1)


def test_a_frozen_block_costs_nothing_and_wakes_up():
    batch = batch_of([2 * CHUNK] * 4, (DROP, FROZEN_OFF), [0, 1, 1, 0])
    tables = refreshed(batch)
    assert [tensor for tensor, _ in chunks(tables.launches[0])] == [0, 0, 3, 3]
    asleep = tables.launches
    batch.hypers = [dataclasses.replace(hyper, plan=DROP) for hyper in batch.hypers]
    tables.refresh(batch)
    assert [tensor for tensor, _ in chunks(tables.launches[0])] == [0, 0, 1, 1, 2, 2, 3, 3]
    batch.hypers[1] = dataclasses.replace(batch.hypers[1], plan=FROZEN_OFF)
    tables.refresh(batch)
    assert tables.launches is asleep  # made once


def test_misaligned_tensors_have_their_own_launch():
    tables = refreshed(batch_of([100, 100, 100], shifted=[1]))
    assert [(launch.aligned, [tensor for tensor, _ in chunks(launch)]) for launch in tables.launches] == [
        (True, [0, 2]),
        (False, [1]),
    ]


def test_a_misaligned_copy_has_its_own_launch():
    """Two bytes off eight: the masters could be read in vectors, but not the parameters that are kept of them."""
    batch = batch_of([100, 100, 100])
    batch.grad_dtype = torch.bfloat16
    for tensors in (batch.grads, batch.copies):
        tensors[:] = [torch.zeros(116, dtype=torch.bfloat16)[:100] for _ in range(3)]
    batch.copies[2] = torch.zeros(116, dtype=torch.bfloat16)[1:101]
    tables = refreshed(batch)
    assert tables.rows[:, 13].tolist() == [copy.data_ptr() for copy in batch.copies]
    assert [(launch.aligned, [tensor for tensor, _ in chunks(launch)]) for launch in tables.launches] == [
        (True, [0, 1]),
        (False, [2]),
    ]


def test_the_rows_have_no_copy_without_master_weights():
    assert refreshed(batch_of([10, 20])).rows[:, 13].tolist() == [0, 0]


def test_what_looks_at_gradients_alone_walks_every_row():
    """Dropped and frozen ones too; the step's own launches stay."""
    batch = batch_of([2 * CHUNK, 10, 0, 30], (DROP, FROZEN_OFF, OFF), [0, 1, 0, 2])
    tables = refreshed(batch)
    before = tables.launches
    (launch,) = tables.launches_of_norm(False)
    assert (launch.kind, chunks(launch)) == ("keep", [(0, 0), (0, 1), (1, 0), (3, 0)])
    assert tables.launches is before and tables.launches_of_norm(False)[0] is launch


def test_places_of_sums_grow_and_are_kept():
    tables = refreshed(batch_of([10]))
    with tables.places(7) as (sums, arrived):
        assert sums.shape == (7,) and sums.dtype == torch.float64 and arrived == 0
    with tables.places(5) as (fewer, _), tables.places(8) as (more, _):
        assert fewer is sums and more.shape == (8,)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_programs_of_a_norm_that_was_interrupted_are_not_counted(error):
    """The next norm counts those of its own."""
    tables = refreshed(batch_of([10]))
    with pytest.raises(error), tables.places(7) as (_, arrived):
        arrived += 3
        raise error
    assert arrived is tables.arrived and arrived == 0


def test_amsgrad_has_its_own_launch():
    tables = refreshed(batch_of([100, 100, 100], amsgrad=[2]))
    assert [(launch.amsgrad, [tensor for tensor, _ in chunks(launch)]) for launch in tables.launches] == [
        (False, [0, 1]),
        (True, [2]),
    ]


@pytest.mark.parametrize(
    "layout, aligned, rows",
    [
        (RowBlock(0, 96, 96), True, False),
        (RowBlock(2**40, 96, 96), True, False),
        (RowBlock(4, 96, 96), False, False),
        (RowBlock(8, 24, 64), True, True),
        (RowBlock(8, 12, 64), False, True),
        (RowBlock(8, 24, 60), False, True),
        (RowBlock(8, 200, 7), True, False),  # one run: how far the next would be does not matter
    ],
)
def test_whole_philox_calls_need_a_layout_in_eights(layout, aligned, rows):
    (launch,) = refreshed(batch_of([96], layouts=[layout])).launches
    assert (launch.aligned, launch.rows) == (aligned, rows)


def test_only_what_changed_is_copied(monkeypatch):
    """Gradients in place and a policy whose draw is the step count: no copy. A moved gradient: the whole table."""
    batch = batch_of([64, 64])
    tables = refreshed(batch)
    written = []
    write = tables.upload.write

    def spy(begin, *pieces):
        written.append((begin, sum(np.frombuffer(piece, np.uint8).size for piece in pieces)))
        write(begin, *pieces)

    monkeypatch.setattr(tables.upload, "write", spy)
    tables.refresh(batch)
    assert written == []
    batch.hypers = [Hyper(5e-4, 0.9, 0.99, 1e-8, 0.1, False, False, DROP)]
    tables.refresh(batch)
    rows = 2 * ctypes.sizeof(TensorRow)
    assert written == [(rows, ctypes.sizeof(HyperRow))]
    batch.grads[1] = torch.zeros(80)[:64]
    tables.refresh(batch)
    assert written[1:] == [(0, rows + ctypes.sizeof(HyperRow))]


def test_a_copy_that_fails_is_done_by_the_next_step(monkeypatch):
    """Or the kernels would go on with addresses, or numbers, of earlier steps."""
    batch = batch_of([64, 64])
    tables = refreshed(batch)
    for change in ("grads", "hypers"):
        if change == "grads":
            batch.grads = [torch.zeros(80)[:64] for _ in range(2)]
        else:
            batch.hypers = [dataclasses.replace(batch.hypers[0], lr=0.5)]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tables.upload, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            tables.refresh(batch)
        tables.refresh(batch)
        assert tables.rows[:, 1].tolist() == [grad.data_ptr() for grad in batch.grads]
        assert tables.hypers.view(torch.float64)[0, 0] == batch.hypers[0].lr


def test_room_that_cannot_be_made_is_no_room(monkeypatch):
    """As when memory runs out: the step after it must not write past the end of the old tables."""
    batch = batch_of([64], (DROP,))
    tables = refreshed(batch)
    batch.hypers = [dataclasses.replace(batch.hypers[0], plan=AGES)]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(device_tables, "Upload", lambda *_: (_ for _ in ()).throw(MemoryError))
        tables.refresh(batch)
    tables.refresh(batch)
    assert tables.upload.device.numel() >= 112 + 128 + 3 * 8 and tables.by_age.shape == (1, 5, 4)


def test_the_update_finds_the_tables_of_its_norm(monkeypatch):
    """Once a step: not by another norm, not for other gradients or hyper-parameters, not by the step after it."""
    batch, looked, address = batch_of([64, 64]), [], torch.Tensor.data_ptr
    tables = refreshed(batch)

    def addresses_are_asked(for_norm: bool) -> bool:
        looked.clear()
        assert DeviceTables.of(batch, for_norm) is tables
        return bool(looked)

    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: looked.append(tensor) or address(tensor))
    asked = [addresses_are_asked(for_norm) for for_norm in (True, True, False, False, True)]
    assert asked == [True, True, False, True, True]
    batch.grads, batch.version = [torch.zeros(64) for _ in range(2)], 1
    assert addresses_are_asked(for_norm=False) and tables.addresses == list(map(address, batch.grads))
    assert addresses_are_asked(for_norm=True)
    batch.hypers, batch.version = [dataclasses.replace(batch.hypers[0], lr=0.5)], 2
    assert addresses_are_asked(for_norm=False) and tables.hypers.view(torch.float64)[0, 0] == 0.5


@pytest.mark.parametrize(
    "what", ["first step", "other launches", "more ages", "launches of all rows", "more sums", "a second graph"]
)
def test_nothing_is_made_in_a_capture(what, monkeypatch):
    """Memory of a graph is written when it is replayed, and again in every replay."""
    batch, made = batch_of([64, 5000], (AGES, DROP), [0, 1]), []
    if what != "first step":
        refreshed(batch)
    if what == "other launches":
        batch.hypers[1] = dataclasses.replace(batch.hypers[1], plan=FROZEN_OFF)
    elif what == "more ages":
        ages = dataclasses.replace(AGES, last_bucket=4, buckets=9, ages=tuple(range(9)))
        batch.hypers[0] = dataclasses.replace(batch.hypers[0], plan=ages)
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    for name in ("zeros", "empty", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: made.append(args))
    with pytest.raises(RuntimeError, match="after one that was like it"):
        tables = DeviceTables.of(batch)
        if what == "launches of all rows":
            tables.launches_of_norm(False)
        elif what == "more sums":
            with tables.places(7):
                pass
        elif what == "a second graph":
            DeviceTables.of(batch)
    assert not made and (batch.table is None) == (what == "first step")
    monkeypatch.undo()
    tables = refreshed(batch)  # the step after it
    assert tables.rows[:, 1].tolist() == [grad.data_ptr() for grad in batch.grads] and not tables.is_captured


@pytest.mark.parametrize("name, column, at", [("lr", 0, 31), ("weight_decay", 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_number_on_the_device_is_not_fetched(dtype, name, column, at, monkeypatch):
    """Its address is in the table, and stays there when its value changes: nothing to copy."""
    batch, number = batch_of([64]), torch.tensor(1e-3, dtype=dtype)
    batch.hypers = [dataclasses.replace(batch.hypers[0], **{name: number})]
    with monkeypatch.context() as patch:
        for method in ("__float__", "item", "tolist"):
            patch.setattr(torch.Tensor, method, lambda *args: pytest.fail("the host waits for the device"))
        tables = refreshed(batch)
        patch.setattr(tables.upload, "write", lambda *args: pytest.fail("copied"))
        number.fill_(5e-4)
        tables.refresh(batch)
    assert tables.hypers[0, column] == number.data_ptr()
    assert tables.hypers[0].view(torch.int32)[at] == (1 if dtype == torch.float32 else 2)
    (by_value,) = hyper_table(batch.hypers)  # for a backend that looks for a number there
    assert getattr(by_value, name) == number and getattr(by_value, f"{name}_at") == 0


def test_copies_of_masters_have_a_column_and_count_for_the_alignment():
    batch = batch_of([64, 64])
    tables = refreshed(batch)
    assert tables.rows.shape == (2, 14) and tables.rows[:, 13].tolist() == [0, 0]
    batch.copies = [torch.zeros(80, dtype=torch.bfloat16)[shift : shift + 64] for shift in (0, 1)]
    batch.table = None
    tables = refreshed(batch)
    assert tables.rows[:, 13].tolist() == [copy.data_ptr() for copy in batch.copies]
    assert [(launch.aligned, chunks(launch)) for launch in tables.launches] == [(True, [(0, 0)]), (False, [(1, 0)])]


def test_the_tables_on_the_device_are_those_of_the_host():
    batch = batch_of([64, 32], (AGES, DROP), [0, 1])
    tables = refreshed(batch)
    assert tables.rows[:, 0].tolist() == [param.data_ptr() for param in batch.params]
    assert tables.rows[:, 1].tolist() == [grad.data_ptr() for grad in batch.grads]
    assert tables.rows[:, 7].tolist() == [64, 32] and tables.rows[:, 12].tolist() == [0, 1]
    assert tables.hypers[:, :5].view(torch.float64).tolist() == [[1e-3, 0.9, 0.99, 1e-8, 0.1]] * 2
    address, count = tables.hypers[0, 8].item(), tables.hypers[0, 9].item()
    ages = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int64)), (count,))
    assert ages.tolist() == [9, 4, 1]
    assert tables.upload.device.data_ptr() < address < tables.upload.device.data_ptr() + tables.upload.device.numel()


def test_ages_grow_with_the_epochs():
    """The table on the device has room for every bucket from the start, and is not moved by a new epoch."""
    batch = batch_of([64], (AGES,))
    tables = refreshed(batch)
    place = tables.upload
    later = dataclasses.replace(AGES, last_bucket=4, ages=(5, 4, 3, 2, 1))
    batch.hypers = [dataclasses.replace(batch.hypers[0], plan=later)]
    tables.refresh(batch)
    assert tables.upload is place and tables.hypers[0, 9] == 5 and tables.by_age.shape == (1, 5, 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_copied_to_a_gpu_lies_in_pinned_memory(device, monkeypatch):
    """Or the host would wait for each copy, and a CUDA graph could not hold one."""
    upload = Upload(48, torch.device("cpu"))
    upload.device = mock.Mock(torch.Tensor, device=torch.device(device), is_cuda=device == "cuda")
    upload.device.numel.return_value = 48
    asked, empty = [], torch.empty
    ask = lambda size, dtype, device, pin_memory: asked.append((device, pin_memory)) or empty(size)
    monkeypatch.setattr(torch, "empty", ask)
    upload._pinned()
    assert asked == [("cpu", device == "cuda")]
