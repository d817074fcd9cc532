"""The machine that runs PTX on the CPU sees what is wrong: by faults planted in compiled kernels, one instruction each,
and by small kernels of every kind of mistake.
"""

import random
import re
import struct

import numpy as np
import pytest
import torch
from batches import CHUNK, PLANS, assert_same_batches, batch_of, copy_of, generator_of
from cases import BF16, F32, require
from ptx import build
from ptx.instructions import UnknownInstruction
from ptx.kernel import Fault, Kernel
from ptx.parse import Module
from test_gradient_norm import finite
from test_ptx_cases import emulation

from graddrop_kernels.backends import cpu
from graddrop_kernels.masks.row_block import RowBlock

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="a C++ compiler is needed, to run PTX on the CPU")
ENTRY = re.compile(r"^(?=\.visible \.entry)", re.MULTILINE)


class Planted:
    """Replaces one place of a pattern in every kernel whose name has ``of``: number ``place``, or a drawn one.
    ``replacement``: as re.sub() takes it.
    """

    def __init__(self, of: str, pattern: str, replacement, seed: int, place: int | None = None):
        self.of, self.pattern, self.replacement = of, re.compile(pattern), replacement
        self.seed, self.place = seed, place
        self.places = 0  # most in a kernel

    def __call__(self, text: str) -> str:
        head, *entries = ENTRY.split(text)
        return head + "".join(map(self._changed, entries))

    def _changed(self, entry: str) -> str:
        found = list(self.pattern.finditer(entry)) if self.of in entry.partition("(")[0] else []
        self.places = max(self.places, len(found))
        if not found or (self.place or 0) >= len(found):
            return entry
        drawn = random.Random(f"{self.seed} {entry.partition('(')[0]}").choice(found)
        match = drawn if self.place is None else found[self.place]
        return entry[: match.start()] + self.pattern.sub(self.replacement, match[0]) + entry[match.end() :]


TRITON, CUDA = "triton on sm_90", "cuda"
WRONG_STEPS = [  # (compiled, in kernels of this name, instruction, another one, dtypes)
    (TRITON, "masked_adamw", r"\b(sub|div|sqrt)\.rn\.f32\b", r"\1.rz.f32", F32),
    (TRITON, "masked_adamw", r"\b(sub|div|sqrt)\.rn\.f32\b", r"\1.rp.f32", F32),
    (TRITON, "masked_adamw", r"\bcvt\.rn\.bf16(x2)?\.f32", r"cvt.rz.bf16\1.f32", BF16),
    (TRITON, "masked_adamw", r"\bsetp\.lt\.s32\b", "setp.le.s32", F32),  # the last element is the one after it
    (TRITON, "masked_adamw", r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0", r"\1 4", F32),
    (TRITON, "masked_adamw", r"\bmul\.hi\.u32\b", "mul.lo.u32", F32),
    (TRITON, "prologue", r"\bmin\.s64\b", "max.s64", F32),
    (CUDA, "14aligned", r"\b(sub|sqrt)\.rn\.f32\b", r"\1.rz.f32", F32),  # it divides zeros that it never stores
    (CUDA, "14aligned", r"\bcvt\.rn\.bf16(x2)?\.f32", r"cvt.rz.bf16\1.f32", BF16),
    (
        CUDA,
        "VariantE2",
        r"\bsetp\.gt\.s32 (%p\d+, %r\d+, %r)",
        r"setp.ge.s32 \1",
        F32,
    ),  # the last group of four is left out
    (CUDA, "14aligned", r"(st\.global\.v4\.u32 \[%rd\d+)", r"\1+4", F32),
    (CUDA, "15prologue", r"\bbar\.sync 0;", "", F32),
]


@pytest.mark.parametrize("compiled, of, pattern, replacement, dtype", WRONG_STEPS, ids=str)
def test_one_wrong_instruction_of_a_step_is_seen(compiled, of, pattern, replacement, dtype, seed):
    require("cpu")
    # the ends of blocks at each place of a thread's elements; many elements that fill no group
    sizes = (33, 34, 35, 36, 200, 545, 546, 547, 548, CHUNK + 8, *[7] * 100)
    layouts = [(size, RowBlock.whole(size)) for size in sizes for _ in range(2)]
    right = batch_of(generator_of(seed), [PLANS["bernoulli"], PLANS["many ages"]], (dtype, dtype), layouts)
    right.grad_scale = torch.tensor(5.3)  # so that every store is carried out
    wrong, expected = copy_of(right), copy_of(right)
    emulation(compiled, seed).run("masked_adamw_", right)
    cpu.masked_adamw_(expected)
    assert_same_batches(right, expected, compiled)
    planted = Planted(of, pattern, replacement, seed)
    with pytest.raises((Fault, pytest.fail.Exception)) as seen:
        emulation(compiled, seed, planted).run("masked_adamw_", wrong)
        assert_same_batches(wrong, expected, compiled)
    assert planted.places > 0
    print(seen.value)


@pytest.mark.parametrize("compiled, of", [(TRITON, "sum_of_squares"), (CUDA, "norm_kernel")])
def test_every_barrier_of_a_norm_is_needed(compiled, of, seed):
    """Taken away one after the other: also those of the last program alone, which adds up what all have left."""
    torch.manual_seed(seed)
    layouts = [(size, RowBlock.whole(size)) for size in (33, CHUNK + 8, 3 * CHUNK)]
    batch = finite(batch_of(generator_of(seed), [PLANS["bernoulli"]], (F32, F32), layouts))
    place, barriers = 0, 1
    while place < barriers:
        without = lambda match: f"mov.pred {match[1]}, {match[2]};" if match[1] else ""
        planted = Planted(of, r"\bbar\.(?:sync\s+0|red\.or\.pred (%p\d+), 0, (%p\d+));", without, seed, place)
        with pytest.raises(Fault, match="no barrier between this|do not meet"):
            emulation(compiled, seed, planted).run("sum_of_squares", copy_of(batch), True)
        place, barriers = place + 1, planted.places
    assert barriers >= 5


# --- small kernels ----------------------------------------------------------------------------------------------------


def kernel(body: str, in_step: bool = False) -> Kernel:
    """A kernel of one parameter, an address, which it finds in %rd0; %r0 is the thread's number."""
    return Kernel(Module(f"""
        .version 8.0
        .shared .align 8 .b8 room[256];
        .visible .entry small(.param .u64 small_param_0)
        {{
        .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .f32 %f<9>; .reg .b64 %rd<9>; .reg .f64 %fd<9>;
        ld.param.u64 %rd0, [small_param_0];
        mov.u32 %r0, %tid.x;
        {body}
        ret;
        }}"""), "small", in_step)  # fmt: skip


def run(body: str, out: torch.Tensor, threads: int = 64, seed: int = 0) -> torch.Tensor:
    kernel(body).launch(1, threads, [out.data_ptr()], [(out.data_ptr(), out.nbytes)], seed)
    return out


STORE = "mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r1;"
MISTAKES = {  # body: the error's text
    f"madd.lo.u32 %r1, %r0, 1, 2; {STORE}": "madd.lo.u32 %r1, %r0, 1, 2",
    f"fma.rn.ftz.f32 %r1, %r0, %r0, %r0; {STORE}": "fma.rn.ftz.f32 %r1, %r0, %r0, %r0",
    f"mov.u32 %r1, %tid.w; {STORE}": "mov.u32 %r1, %tid.w",
    f"add.s32 %r0, %r0, 1; {STORE}": "store of 4 bytes, 0 bytes after the end of the tensor before it, by thread 63",
    f"add.s64 %rd0, %rd0, -4; {STORE}": "store of 4 bytes before every tensor by thread 0",
    "add.s64 %rd1, %rd0, 2; ld.global.b32 %r1, [%rd1];": "misaligned load of 4 bytes",
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+4];": "misaligned load of 16 bytes",
    "setp.lt.u32 %p1, %r0, 7; @%p1 bar.sync 0;": "the lanes of a warp do not meet here",
    "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;": "the warps of a block do not meet",
    "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;": "the warps of a block do not meet",
    "and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; @%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;": "do not meet here",
    "shfl.sync.bfly.b32 %r3, %r0, 1, 31, 15;": "a shuffle of a part of a warp",
    "st.shared.b32 [room+256], %r0;": "store of 4 bytes at 256 of 256 bytes of shared memory",
    "bar.sync 0; st.global.u32 [%rd0], %r0;": "no barrier between this store and the store of thread",
    f"bar.sync 0; ld.global.u32 %r1, [%rd0]; {STORE}": "no barrier between this (store|load) and the (load|store) of",
}  # fmt: skip


@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_is_an_error_that_names_the_instruction(body, seed):
    with pytest.raises((Fault, UnknownInstruction), match=MISTAKES[body]):
        run(body, torch.zeros(64, dtype=torch.int32), seed=seed)


def test_threads_that_meet_exchange_what_they_have(seed):
    lane = torch.arange(64, dtype=torch.int32)
    assert run(f"shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1; {STORE}", torch.zeros_like(lane)).equal(lane ^ 5)
    reverse = """cvt.u64.u32 %rd2, %r0; shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0; bar.sync 0;
        sub.s32 %r3, 252, %r2; ld.shared.b32 %r1, [%r3];"""
    assert run(f"{reverse} {STORE}", torch.zeros_like(lane), seed=seed).equal(lane.flip(0))
    for operation, found in (("or", 1), ("and", 0)):
        body = f"setp.eq.u32 %p1, %r0, 9; bar.red.{operation}.pred %p2, 0, %p1; selp.u32 %r1, 1, 0, %p2; {STORE}"
        assert run(body, torch.full_like(lane, 7)).equal(torch.full_like(lane, found)), operation


def test_threads_may_store_the_same_without_a_barrier():
    out = torch.zeros(1, dtype=torch.int32)
    assert run("mov.b32 %r1, 7; st.shared.b32 [room], %r1; bar.sync 0; st.global.u32 [%rd0], %r1;", out).eq(7).all()


def test_the_lanes_of_one_warp_are_in_step_at_a_store(seed):
    """As Triton relies on where a program is one warp: all have read what the first one overwrites."""
    out = torch.full((33,), 5, dtype=torch.int32)
    body = f"""ld.global.u32 %r2, [%rd0+128]; add.s32 %r1, %r2, 1; setp.eq.u32 %p1, %r0, 9;
        @%p1 st.global.u32 [%rd0+128], %r1; {STORE}"""
    kernel(body, in_step=True).launch(1, 32, [out.data_ptr()], [(out.data_ptr(), out.nbytes)], seed)
    assert out.eq(6).all()


def bits(*values: float) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]


INF, NAN, TINY = float("inf"), float("nan"), 2.0**-149
CANONICAL = 0x7FFFFFFF
VALUES = [  # what the manual says of single instructions: (instruction, the bits of its operands, of its result)
    ("add.rn.f32 %r1, %r2, %r3", bits(1.0, 2.0**-24), bits(1.0)[0]),
    ("add.rp.f32 %r1, %r2, %r3", bits(1.0, 2.0**-24), bits(1.0)[0] + 1),
    ("add.rz.f32 %r1, %r2, %r3", bits(-1.0, -(2.0**-24)), bits(-1.0)[0]),
    ("add.rm.f32 %r1, %r2, %r3", bits(-1.0, -(2.0**-24)), bits(-1.0)[0] + 1),
    ("add.f32 %r1, %r2, %r3", bits(INF, -INF), CANONICAL),
    ("mul.f32 %r1, %r2, %r3", bits(TINY, 0.5), 0),
    ("fma.rn.f32 %r1, %r2, %r2, %r3", bits(1 + 2.0**-23, -(1 + 2.0**-22)), bits(2.0**-46)[0]),
    ("min.f32 %r1, %r2, %r3", bits(NAN, 3.0), bits(3.0)[0]),
    ("min.f32 %r1, %r2, %r3", bits(0.0, -0.0), bits(-0.0)[0]),
    ("max.f32 %r1, %r2, %r3", bits(-0.0, 0.0), 0),
    ("neg.f32 %r1, %r2", bits(0.0), bits(-0.0)[0]),
    ("abs.f32 %r1, %r2", bits(-INF), bits(INF)[0]),
    ("cvt.rn.bf16x2.f32 %r1, %r2, %r3", bits(1 + 2.0**-8, NAN), 0x3F80_7FFF),
    ("cvt.rn.bf16x2.f32 %r1, %r2, %r3", bits(1 + 3 * 2.0**-8, 3.4e38), 0x3F82_7F80),
    ("cvt.rz.bf16x2.f32 %r1, %r2, %r3", bits(1 + 3 * 2.0**-8, 3.4e38), 0x3F81_7F7F),
    ("cvt.rn.f16x2.f32 %r1, %r2, %r3", bits(65520.0, 2.0**-25), 0x7C00_0000),
    ("cvt.rzi.u32.f32 %r1, %r2", bits(-3.0), 0),
    ("cvt.rzi.u32.f32 %r1, %r2", bits(1e20), 0xFFFFFFFF),
    ("cvt.rzi.s32.f32 %r1, %r2", bits(NAN), 0),
    ("cvt.rzi.s32.f32 %r1, %r2", bits(-3.9), 2**32 - 3),
    ("cvt.rn.f32.s32 %r1, %r2", [2**24 + 3], bits(2.0**24 + 4)[0]),
    ("mul.hi.u32 %r1, %r2, %r3", [2**32 - 1, 2**32 - 1], 2**32 - 2),
    ("mad.lo.s32 %r1, %r2, %r3, 7", [2**31, 3], 2**31 + 7),
    ("shl.b32 %r1, %r2, %r3", [1, 32], 0),
    ("shr.s32 %r1, %r2, %r3", [2**31, 40], 2**32 - 1),
    ("shr.u32 %r1, %r2, %r3", [2**31, 40], 0),
    ("prmt.b32 %r1, %r2, %r3, 0x9054U", [0x44332280, 0x88776655], 0x00806655 & 0x00FFFFFF),
    ("bfe.u32 %r1, %r2, 4, 8", [0xABCD], 0xBC),
    ("bfe.s32 %r1, %r2, 4, 8", [0xABCD], 2**32 - 0x44),
    ("bfe.s32 %r1, %r2, 28, 9", [0x90000000], 2**32 - 7),
    ("bfi.b32 %r1, %r2, %r3, 8, 12", [0xABCDE, 0xFFFFFFFF], 0xFFFCDEFF),
    ("clz.b32 %r1, %r2", [0], 32),
    ("setp.ne.f32 %p1, %r2, %r2; selp.u32 %r1, 1, 0, %p1", bits(NAN), 0),
    ("setp.neu.f32 %p1, %r2, %r2; selp.u32 %r1, 1, 0, %p1", bits(NAN), 1),
    ("setp.geu.f32 %p1, %r2, 0f3F800000; selp.u32 %r1, 1, 0, %p1", bits(NAN), 1),
    ("setp.lt.s32 %p1, %r2, 0; selp.u32 %r1, 1, 0, %p1", [2**32 - 1], 1),
    ("setp.lt.u32 %p1, %r2, 1; selp.u32 %r1, 1, 0, %p1", [2**32 - 1], 0),
    ("mov.b64 %rd2, {%r2, %r3}; mov.b64 {_, %r1}, %rd2", [1, 2], 2),
]  # fmt: skip


def test_instructions_mean_what_the_manual_says():
    body = ""
    for i, (instruction, operands, _) in enumerate(VALUES):
        given = "".join(f"mov.b32 %r{2 + place}, {value};" for place, value in enumerate(operands))
        body += f"{given} {instruction}; st.global.u32 [%rd0+{4 * i}], %r1;"
    found = run(body, torch.zeros(len(VALUES), dtype=torch.int32), threads=1).tolist()
    for (instruction, operands, expected), result in zip(VALUES, found):
        assert result % 2**32 == expected, f"{instruction} of {operands}: {result % 2**32:#x} is not {expected:#x}"


def test_the_order_of_programs_is_drawn_by_the_seed():
    """Each adds 1 to a counter, and writes what it has found."""
    body = "mov.u32 %r2, %ctaid.x; mov.b32 %r3, 1; atom.global.gpu.acq_rel.add.u32 %r1, [%rd0+64], %r3;"
    body += "mad.wide.u32 %rd1, %r2, 4, %rd0; st.global.u32 [%rd1], %r1;"
    orders = []
    for seed in (1, 1, 2):
        out = torch.zeros(17, dtype=torch.int32)
        kernel(body).launch(16, 1, [out.data_ptr()], [(out.data_ptr(), out.nbytes)], seed)
        assert sorted(out[:16].tolist()) == list(range(16)) and out[16] == 16
        orders.append(out.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_numbers_in_a_registers_upper_part_are_kept_by_width():
    out = torch.zeros(64, dtype=torch.int32)
    body = f"mov.b32 %r2, 0x80ff; cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r1, %rs1; {STORE}"
    assert run(body, out).eq(np.int32(np.uint16(0x80FF).astype(np.int16))).all()
