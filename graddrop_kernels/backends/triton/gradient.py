"""The mask rule in Triton, and gradients as the moments take them: read, masked and scaled, block by block.

The update (update.py), the norm (norm.py) and the kernels that write masks (masks.py) use it.
"""

import triton
import triton.language as tl

from ..tensor_table import MASK_KINDS
from .arithmetic import fma
from .random import DOMAIN_BUCKET, DOMAIN_ELEMENT, high16, join4, join8, normals

KEEP, OFF, BERNOULLI, GAUSSIAN, BUCKET, FIXED = (
    tl.constexpr(MASK_KINDS[kind]) for kind in ("keep", "off", "bernoulli", "gaussian", "bucket", "fixed")
)


@triton.jit
def bits_of_plane(words, plane, plane_bytes, start, numel, VEC: tl.constexpr):
    """The bits of the VEC elements from each local index in start, of one bit-plane: uint32 0 or 1, [VEC * N]."""
    byte = tl.load(words + plane * plane_bytes + (start >> 3), mask=start < numel, other=0).to(tl.uint32)
    if VEC == 8:
        return join8(byte & 1, (byte >> 1) & 1, (byte >> 2) & 1, (byte >> 3) & 1,
                     (byte >> 4) & 1, (byte >> 5) & 1, (byte >> 6) & 1, byte >> 7)  # fmt: skip
    elif VEC == 4:
        byte = byte >> (start & 4).to(tl.uint32)
        return join4(byte & 1, (byte >> 1) & 1, (byte >> 2) & 1, (byte >> 3) & 1)
    else:
        return (byte >> (start & 7).to(tl.uint32)) & 1


@triton.jit
def keep_and_bucket(
    row, block_start,
    KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(keep, bucket) of the BLOCK elements from block_start on: the mask rule. PLANES < 0: buckets are recomputed."""
    start = block_start + tl.arange(0, BLOCK // VEC) * VEC
    bucket = tl.zeros([BLOCK], tl.uint32)
    if KIND_ == BERNOULLI:
        keep = high16(start, row, DOMAIN_ELEMENT, VEC, ROWS) >= row.threshold << 16
    elif KIND_ == FIXED:
        keep = bits_of_plane(row.mask_words, 0, 0, start, row.numel, VEC) != 0
    else:
        if PLANES < 0:
            bucket = ((high16(start, row, DOMAIN_BUCKET, VEC, ROWS) >> 16) * row.buckets) >> 16
        else:
            plane_bytes = ((row.numel + 31) >> 5) << 2
            for plane in tl.static_range(PLANES):
                bucket += bits_of_plane(row.mask_words, plane, plane_bytes, start, row.numel, VEC) << plane
        keep = (row.first_bucket <= bucket) & (bucket <= row.last_bucket)
    return keep, bucket


@triton.jit
def load_gradient(at, in_bounds, wanted, SPARE: tl.constexpr, FULL: tl.constexpr):
    """Loads a block of gradients as they are stored, 0 out of bounds. With SPARE, unwanted ones are not read."""
    if SPARE:
        return tl.load(at, mask=wanted if FULL else in_bounds & wanted, other=0.0)
    else:
        return tl.load(at, mask=in_bounds, other=None if FULL else 0.0)


@triton.jit
def masked_gradient(
    row, g, clip, wanted, block_start,
    KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, SELECT: tl.constexpr,
    CLIP: tl.constexpr, UPDATE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(g, keep, bucket) of the BLOCK elements from block_start on. g are their float32 gradients, clipped, signed,
    masked and scaled, with UPDATE whole; keep and bucket are the mask.

    SELECT: g of a dropped block may have any value.
    """
    if CLIP:
        g = g * clip
    if SELECT:
        g = tl.where(wanted, g, 0.0)
    g = g * row.factor
    if KIND_ == GAUSSIAN:
        start = block_start + tl.arange(0, BLOCK // VEC) * VEC
        z = normals(start, row, VEC, ROWS, INTERPRETED)
        g = g * fma(z, row.deviation, tl.full(z.shape, 1.0, tl.float32), INTERPRETED)
    keep, bucket = True, 0
    if KIND_ != KEEP and KIND_ != GAUSSIAN:
        keep, bucket = keep_and_bucket(row, block_start, KIND_, PLANES, VEC, ROWS, BLOCK)
        if not UPDATE:
            g = tl.where(keep, g, 0.0)  # selection: a dropped inf or NaN is dropped
    return g, keep, bucket
