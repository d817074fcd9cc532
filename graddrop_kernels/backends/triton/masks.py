"""Writes masks on the device at the speed of its memory, as bools or as the bit-planes of buckets."""

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


@triton.jit
def packed_bytes(bits, BLOCK: tl.constexpr):
    """0 or 1 of BLOCK elements -> one byte per eight elements, the first in the lowest bit: [BLOCK // 8]."""
    eights = tl.reshape(bits.to(tl.uint32), [BLOCK // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit(do_not_specialize=["numel"])
def mask_kernel(
    table, scalars, out, numel: tl.int64,
    KIND_: tl.constexpr, PLANES_: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    NUM_PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the mask or NUM_PLANES bit-planes, BLOCK elements per program. The tail of a plane's last word is zero."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    row = load_row(table, scalars, tl.float32, tl.float32, tl.float32, 1)  # only the fields that a mask needs are read
    keep, bucket = keep_and_bucket(row, begin, KIND_, PLANES_, VEC, ROWS, BLOCK)
    plane_bytes = ((numel + 31) >> 5) << 2
    byte = (begin >> 3) + tl.arange(0, BLOCK // 8)
    if NUM_PLANES == 0:
        tl.store(out + element, keep.to(tl.uint8), mask=element < numel)
    else:
        bucket = tl.where(element < numel, bucket, 0)
        for plane in tl.static_range(NUM_PLANES):
            bits = packed_bytes((bucket >> plane) & 1, BLOCK)
            tl.store(out + plane * plane_bytes + byte, bits, mask=byte < plane_bytes)


def keep_mask(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, words, device
) -> torch.Tensor:
    """The keep mask of a drawn or given mask (bernoulli, bucket, fixed): bool tensor of shape (numel,)."""
    out = torch.empty(numel, dtype=torch.bool, device=device)
    _run(plan, key, completed_steps, layout, words, out.view(torch.uint8), numel)
    return out


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device) -> torch.Tensor:
    """The bit-planes of a parameter's buckets, as bitmask.pack_buckets makes them."""
    out = torch.empty(num_planes(buckets), num_words(numel), dtype=torch.int32, device=device)
    if out.numel():
        plan = MaskPlan("bucket", buckets=buckets, last_bucket=buckets)
        _run(plan, key, 0, layout, None, out.view(torch.uint8), numel, out.size(0))
    return out


def _run(plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, words, out, numel: int, planes=0):
    if numel == 0:
        return
    row = np.zeros(1, TENSOR_ROW)
    row["key"], row["mask_words"] = key, 0 if words is None else words.data_ptr()
    row["numel"], row["base"] = numel, layout.base
    row["local_inner"], row["global_inner"] = layout.local_inner, layout.global_inner
    draw = 0 if plan.kind == "bucket" else completed_steps if plan.draw is None else plan.draw
    scalars = np.zeros(16, np.uint32)  # a StepRow with only the fields that a mask needs
    scalars[9:14] = plan.threshold, draw & 0xFFFFFFFF, plan.buckets, plan.first_bucket, plan.last_bucket
    to_device = lambda array, dtype: torch.from_numpy(array.view(dtype)).to(out.device)
    block = _block()
    eights = in_eights(layout.base, layout.local_inner, layout.global_inner, numel)
    with on_device(out.device):
        mask_kernel[(-(-numel // block),)](
            to_device(row, np.int64), to_device(scalars, np.int32), out, numel,
            KIND_=MASK_KINDS[plan.kind], PLANES_=num_planes(plan.buckets) if plan.bitpacked else -1,
            VEC=8 if eights else 1, ROWS=numel > layout.local_inner, NUM_PLANES=planes,
            BLOCK=block,
        )  # fmt: skip


def _block() -> int:
    return 65536 if interpreted() else 1024
