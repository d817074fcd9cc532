"""Masks by themselves, made on the device at the speed of its memory: written as bools, packed to bits, or counted."""

import numpy as np
import torch
import triton
import triton.language as tl

from ...masks.bitmask import num_planes, num_words
from ...masks.plan import MaskPlan
from ...masks.row_block import RowBlock
from ..launches import in_eights
from ..tensor_table import MASK_KINDS, TENSOR_ROW
from .gradient import keep_and_bucket
from .launch import on_device
from .probe import interpreted
from .row import load_row

_WRITE, _PACK, _COUNT, _PLANES = range(4)  # what becomes of a mask
WRITE, PACK, COUNT, PLANES = (tl.constexpr(form) for form in range(4))


@triton.jit
def packed_bytes(bits, BLOCK: tl.constexpr):
    """0 or 1 of BLOCK elements -> one byte of eight, the first lowest: [BLOCK // 8]."""
    eights = tl.reshape(bits.to(tl.uint32), [BLOCK // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit(do_not_specialize=["numel"])
def mask_kernel(
    table, scalars, out, numel: tl.int64,
    KIND_: tl.constexpr, PLANES_: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr,
    NUM_PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements a program. The tail of the last word of packed bits is zero."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    row = load_row(table, scalars, tl.float32, tl.float32, tl.float32, 1)  # of which only what a mask needs is read
    keep, bucket = keep_and_bucket(row, begin, KIND_, PLANES_, VEC, ROWS, BLOCK)
    keep = keep & (element < numel)
    plane_bytes = ((numel + 31) >> 5) << 2
    byte = (begin >> 3) + tl.arange(0, BLOCK // 8)
    if FORM == WRITE:
        tl.store(out + element, keep.to(tl.uint8), mask=element < numel)
    elif FORM == PACK:
        tl.store(out + byte, packed_bytes(keep, BLOCK), mask=byte < plane_bytes)
    elif FORM == COUNT:
        tl.atomic_add(out, tl.sum(keep.to(tl.int64)))
    else:
        bucket = tl.where(element < numel, bucket, 0)
        for plane in tl.static_range(NUM_PLANES):
            bits = packed_bytes((bucket >> plane) & 1, BLOCK)
            tl.store(out + plane * plane_bytes + byte, bits, mask=byte < plane_bytes)


@triton.jit(do_not_specialize=["numel"])
def pack_kernel(bits, out, numel: tl.int64, BLOCK: tl.constexpr):
    """Packs BLOCK given bools a program."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    byte = (begin >> 3) + tl.arange(0, BLOCK // 8)
    given = tl.load(bits + element, mask=element < numel, other=0) != 0
    tl.store(out + byte, packed_bytes(given, BLOCK), mask=byte < (((numel + 31) >> 5) << 2))


def keep_mask(plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, words, device):
    """The keep mask of a drawn or given mask (bernoulli, bucket, fixed): bool tensor of shape (numel,)."""
    out = torch.empty(numel, dtype=torch.bool, device=device)
    _run(plan, key, completed_steps, layout, words, _WRITE, out.view(torch.uint8), numel)
    return out


def packed_mask(plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, words, device):
    """The same as bits: int32 tensor of shape (num_words(numel),), as bitmask.pack."""
    out = torch.empty(num_words(numel), dtype=torch.int32, device=device)
    _run(plan, key, completed_steps, layout, words, _PACK, out.view(torch.uint8), numel)
    return out


def count_kept(plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, words, device):
    """How many elements the mask keeps: int64 tensor of shape (), on the device."""
    out = torch.zeros((), dtype=torch.int64, device=device)
    _run(plan, key, completed_steps, layout, words, _COUNT, out, numel)
    return out


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device) -> torch.Tensor:
    """The bit-planes of a parameter's buckets, as bitmask.pack_buckets."""
    out = torch.empty(num_planes(buckets), num_words(numel), dtype=torch.int32, device=device)
    plan = MaskPlan("bucket", buckets=buckets, last_bucket=buckets)
    _run(plan, key, 0, layout, None, _PLANES, out.view(torch.uint8), numel, num_planes(buckets))
    return out


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bool tensor of any shape -> its bits, as bitmask.pack."""
    bits = bits.contiguous().view(torch.uint8)
    out = torch.empty(num_words(bits.numel()), dtype=torch.int32, device=bits.device)
    if bits.numel():
        block = _block()
        with on_device(bits.device):
            pack_kernel[(-(-bits.numel() // block),)](bits, out.view(torch.uint8), bits.numel(), BLOCK=block)
    return out


def _run(plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, words, form: int, out, numel: int, planes=0):
    if numel == 0:
        return
    row = np.zeros(1, TENSOR_ROW)
    row["key"], row["mask_words"] = key, 0 if words is None else words.data_ptr()
    row["numel"], row["base"] = numel, layout.base
    row["local_inner"], row["global_inner"] = layout.local_inner, layout.global_inner
    draw = 0 if plan.kind == "bucket" else completed_steps if plan.draw is None else plan.draw
    scalars = np.zeros(16, np.uint32)  # a StepRow: only what a mask needs
    scalars[9:14] = plan.threshold, draw & 0xFFFFFFFF, plan.buckets, plan.first_bucket, plan.last_bucket
    to_device = lambda array, dtype: torch.from_numpy(array.view(dtype)).to(out.device)
    block = _block()
    with on_device(out.device):
        mask_kernel[(-(-numel // block),)](
            to_device(row, np.int64), to_device(scalars, np.int32), out, numel,
            KIND_=MASK_KINDS[plan.kind], PLANES_=num_planes(plan.buckets) if plan.bitpacked else -1,
            VEC=8 if in_eights(layout, numel) else 1, ROWS=numel > layout.local_inner, FORM=form,
            NUM_PLANES=planes, BLOCK=block,
        )  # fmt: skip


def _block() -> int:
    return 65536 if interpreted() else 1024
