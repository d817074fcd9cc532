"""The compiled Triton kernels, read without a GPU: registers, spills, the width of memory accesses, instructions an
element; how many compilations and launches a training run takes; that every target compiles.
"""

import os
import re
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed: its kernels were not compiled", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: interpreted functions cannot be compiled", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2]))

from counting_driver import compile_keys, counting_driver
from toy import Encoder, random_grads

from benchmarks.gpu import sass
from benchmarks.gpu.triton_targets import (
    BF16,
    F32,
    MODES,
    GPUTarget,
    Variant,
    compile_norm,
    compile_prologue,
    compile_update,
    machine_code,
)
from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    LinearAnneal,
    backends,
    param_groups,
)
from graddrop_kernels.backends import triton as backend
from graddrop_kernels.backends.batch import ROUND_MOMENTS, ROUND_PARAMS, Hyper, TensorBatch
from graddrop_kernels.backends.device_tables import CHUNK
from graddrop_kernels.backends.triton import launch
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock

MAIN = ["fff", "bbf", "bbb"]
KINDS = {"keep": -1, "bernoulli": -1, "gaussian": -1, "bucket": -1, "planes": 3, "fixed": -1}
PLAIN = [
    Variant(mode, "bucket" if name == "planes" else name, planes)
    for mode, (name, planes) in product(MAIN, KINDS.items())
]
MIXED = [  # amsgrad, frozen, ages, grad_scale and the float16 modes, each with several kinds
    Variant("fff", "bernoulli", frozen=True, amsgrad=True),
    Variant("bbb", "bernoulli", frozen=True),
    Variant("bbf", "fixed", frozen=True, amsgrad=True),
    Variant("bbf", "fixed", frozen=True),
    Variant("fff", "bucket", frozen=True, ages=True),
    Variant("bbb", "bucket", frozen=True, ages=True, amsgrad=True),
    Variant("bbf", "bucket", planes=3, frozen=True, ages=True),
    Variant("hhh", "bucket", frozen=True),
    Variant("fff", "bernoulli", grad_scale=True, amsgrad=True),
    Variant("bbf", "gaussian", grad_scale=True),
    Variant("hhf", "keep", grad_scale=True),
    Variant("bbb", "fixed", amsgrad=True),
    Variant("ffb", "bernoulli"),
    Variant("ffb", "bucket", frozen=True, ages=True, amsgrad=True),
    Variant("hhf", "bernoulli"),
    Variant("hhh", "bernoulli"),
    Variant("fbf", "bernoulli"),
    Variant("fbf", "gaussian"),
    Variant("fbf", "bucket", frozen=True, ages=True),
    Variant("fhf", "bernoulli", frozen=True, amsgrad=True, grad_scale=True, clip=True),
    Variant("bbb", "bernoulli", stochastic=ROUND_PARAMS),
    Variant("bbf", "bernoulli", stochastic=ROUND_PARAMS, clip=True),
    Variant("bbb", "keep", stochastic=ROUND_PARAMS),
    Variant("bbf", "gaussian", stochastic=ROUND_PARAMS, frozen=True, amsgrad=True),
    Variant("ffb", "bernoulli", stochastic=ROUND_MOMENTS),
    Variant("ffb", "keep", stochastic=ROUND_MOMENTS, amsgrad=True),
    Variant("bbb", "bucket", frozen=True, ages=True, stochastic=ROUND_MOMENTS),
    Variant("bbb", "bernoulli", stochastic=ROUND_PARAMS | ROUND_MOMENTS),
    Variant("fff", "bernoulli", update=True),
    Variant("bbf", "bernoulli", update=True, cautious=True),
    Variant("bbb", "fixed", update=True),
    Variant("fff", "bucket", planes=0, update=True, amsgrad=True),
    Variant("fbf", "bernoulli", update=True),
    Variant("bbb", "bernoulli", cautious=True),
    Variant("fff", "keep", cautious=True, amsgrad=True),
]
# Narrow accesses, or divisions of 64-bit indices by subroutine: right, not fast.
SLOW = [
    Variant("fff", "bernoulli", aligned=False),
    Variant("bbf", "gaussian", aligned=False),
    Variant("bbb", "fixed", aligned=False),
    Variant("fff", "bucket", aligned=False, rows=True, frozen=True, ages=True, amsgrad=True),
    Variant("bbb", "bucket", planes=3, aligned=False, frozen=True),
    Variant("bbf", "bernoulli", rows=True),
    Variant("bbb", "bucket", rows=True, frozen=True, ages=True),
    Variant("fbf", "bernoulli", aligned=False, frozen=True),
    Variant("bbf", "bernoulli", aligned=False, stochastic=ROUND_PARAMS),
]

# Ceilings: the largest of fff, bbf, bbb by Triton 3.7.1 on sm_90 plus 10 %. Instructions an element: those of a whole
# block and its share of what comes before the loop.
INSTRUCTIONS = {
    "keep": 54, "bernoulli": 70, "gaussian": 97, "bucket": 78, "planes": 72, "fixed": 60
}  # fmt: skip
ADDED = {"amsgrad": 6, "frozen": 8, "ages": 16, "grad_scale": 13, "clip": 3, "copies": 4}
ADDED_BY_ROUNDING = (0, 22, 22, 44)  # by bits of TensorBatch.stochastic
# 64 registers (which 3.9 takes where 3.7 takes 48): eight programs of 128 threads share 65536; 96: five; 128: four.
REGISTERS = {"keep": 64, "bernoulli": 64, "gaussian": 80, "bucket": 72, "planes": 64, "fixed": 64}
MOST_REGISTERS = 128
ELEMENTS, TURNS = 8, 4  # of a thread in a turn of the loop; of a program


def name_of(variant: Variant) -> str:
    return "planes" if variant.planes >= 0 else variant.kind


def instructions_per_element(code: sass.Kernel) -> float:
    return (len(code.body) + len(code.prologue) / TURNS) / ELEMENTS


def widths(variant: Variant, streams: str) -> Counter:
    """Accesses of a thread in a turn, as wide as they can be: {bytes: number}. p: parameters, g: gradients and copies,
    m: moments.
    """
    counts = Counter()
    for stream in streams:
        itemsize = MODES[variant.mode]["pgm".index(stream)].itemsize
        counts[variant.vector * itemsize] += ELEMENTS // variant.vector
    return counts


def widest(variant: Variant) -> int:
    return variant.vector * max(dtype.itemsize for dtype in MODES[variant.mode])


def widest_store(code: sass.Kernel) -> int:
    return max(i.bytes for i in code.instructions if i.name == "STG")


def assert_nothing_spilled(code: sass.Kernel) -> None:
    """ptxas may set a register aside in the last, partial block, to fit one more program: not on the hot path."""
    assert code.local == 0 and code.stack <= 8, f"{code.stack} bytes of stack, {code.local} of local memory"
    spilled = [i for i in code.prologue + code.body if i.name in sass.LOCAL]
    assert not spilled, f"on the way of whole blocks: {spilled[0]}"


@pytest.mark.parametrize("variant", PLAIN + MIXED, ids=str)
def test_update_of_whole_vectors(variant):
    code = machine_code(compile_update(variant))
    path = code.prologue + code.body
    assert_nothing_spilled(code)
    between_threads = [i for i in path if i.name in sass.SHARED]
    assert code.shared == 0 and not between_threads, f"elements change their thread: {between_threads[:1]}"
    assert not [i for i in path if i.pipe == "FP64"]
    assert not [i for i in path if i.name == "STG" and i.predicate], "a store of a whole block has a predicate"

    # A turn reads and writes its elements and nothing else: what it knows of the tensor is in registers.
    loads = Counter(i.bytes for i in code.body if i.name == "LDG")
    moments = "mmm" if variant.amsgrad else "mm"
    copy_read = "g" * (variant.copies and (variant.frozen or variant.update))  # its dropped elements stay
    if variant.planes > 0 or variant.kind == "fixed":
        assert loads.pop(1) == max(variant.planes, 1) * ELEMENTS // variant.vector, "a byte of bits a vector"
    of_buckets = Counter({8: ELEMENTS, 4: ELEMENTS} if variant.ages else {})  # three scalars of each element's bucket
    assert loads == widths(variant, "pg" + moments + copy_read) + of_buckets
    assert code.accesses("STG") == widths(variant, "p" + moments + "g" * (variant.grad_scale + variant.copies))

    added = sum(more for flag, more in ADDED.items() if getattr(variant, flag)) + ADDED_BY_ROUNDING[variant.stochastic]
    most = INSTRUCTIONS[name_of(variant)] + added
    found = instructions_per_element(code)
    assert found <= most, f"{found:.1f} of {most}"
    assert code.registers <= (MOST_REGISTERS if added else REGISTERS[name_of(variant)])


@pytest.mark.parametrize("variant", SLOW, ids=str)
def test_update_of_other_tensors(variant):
    """No vectors to be had, or shards in rows: nothing spilled, and still no exchange between threads."""
    code = machine_code(compile_update(variant))
    assert code.stack == code.local == code.shared == 0
    assert not [i for i in code.instructions if i.name in sass.SHARED + sass.LOCAL]
    assert widest_store(code) == widest(variant), "an access wider than the alignment allows is a fault on the GPU"


@pytest.mark.parametrize("found_inf, ages, advance", [*product((False, True), (False, True), (True,)), (False,) * 3])
def test_prologue(found_inf, ages, advance):
    code = machine_code(compile_prologue(found_inf, ages, advance=advance))
    assert code.stack == code.local == code.shared == 0
    assert code.registers <= 56
    assert [i for i in code.instructions if i.pipe == "FP64"], "bias corrections are made in float64"


NORMS = [
    (Variant("fff", "keep"), False),
    (Variant("bbb", "keep"), True),
    (Variant("bbf", "bernoulli"), True),
    (Variant("bbb", "gaussian"), True),
    (Variant("fff", "bucket", planes=3, grad_scale=True), True),
    (Variant("fbf", "bucket"), True),
]


@pytest.mark.parametrize("variant, masked", NORMS, ids=str)
def test_norm(variant, masked):
    """Whole vectors of gradients; one thread stores the sum of its program and counts it, in this order for all."""
    code = machine_code(compile_norm(variant, masked))
    assert code.stack == code.local == 0 and code.registers <= (96 if variant.kind == "gaussian" else 72)
    itemsize = MODES[variant.mode][1].itemsize
    assert sum(i.bytes == 16 for i in code.instructions if i.name == "LDG") == ELEMENTS * itemsize // 16
    names = [i.name for i in code.instructions]
    count, stores = names.index("ATOMG"), [place for place, name in enumerate(names) if name == "STG"]
    assert len(stores) == 3 and stores[0] < names.index("MEMBAR") < count < names.index("CCTL") < stores[1]
    text = compile_norm(variant, masked).asm["ptx"]
    (counting,) = re.findall(r"(@%p\d+) atom\.global\.gpu\.acq_rel", text)
    storing, *_ = re.findall(r"(@%p\d+) st\.global\.b64", text)
    assert counting == storing, "another thread counts than stores"


ELSEWHERE = [
    Variant("ffb", "bernoulli", stochastic=ROUND_MOMENTS),
    Variant("fff", "bernoulli"),
    Variant("bbf", "bucket", planes=3, frozen=True, ages=True),
    Variant("bbb", "gaussian", amsgrad=True),
    Variant("fbf", "bernoulli", frozen=True),
    Variant("bbb", "keep", stochastic=ROUND_PARAMS, clip=True),
]
NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 100, 120)]
AMD = [GPUTarget("hip", arch, threads) for arch, threads in (("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32))]


@pytest.mark.parametrize("target", NVIDIA, ids=lambda target: f"sm_{target.arch}")
def test_other_targets_of_nvidia(target):
    for variant in ELSEWHERE:
        code = machine_code(compile_update(variant, target))
        assert_nothing_spilled(code)
        assert code.shared == 0 and not [i for i in code.instructions if i.name in sass.SHARED], variant
        assert widest_store(code) == widest(variant), variant
    for code in map(machine_code, (compile_prologue(True, True, target), compile_norm(ELSEWHERE[0], True, target))):
        assert code.stack == 0


@pytest.mark.parametrize("target", AMD, ids=lambda target: target.arch)
def test_targets_of_amd(target):
    for compiled in (*(compile_update(variant, target) for variant in ELSEWHERE), compile_prologue(True, True, target)):
        text = compiled.asm["amdgcn"]
        names = ("vgpr_spill_count", "group_segment_fixed_size", "private_segment_fixed_size")
        found = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names}
        assert not any(found.values()), found
        assert not re.search(r"\bds_\w+|\bs_barrier", text), "elements change their thread"
    text = compile_norm(ELSEWHERE[0], True, target).asm["amdgcn"]
    assert re.search(r"\.vgpr_spill_count:\s*0\b", text)


# --- a training run ---------------------------------------------------------------------------------------------------


def shapes_of_a_transformer(count: int) -> list[int]:
    """Sizes in elements: matrices and vectors, small, in the proportions of an encoder's layers."""
    return [(4096, 64, 64 * 5, 64)[i % 4] + 8 * (i % 3) for i in range(count)]


@pytest.fixture
def driver(monkeypatch):
    """Launches are noted down, compilations counted; the triton backend takes CPU tensors."""
    everywhere = {
        name: replace(row, devices=None, unavailable=lambda: None) if name == "triton" else row
        for name, row in backends._BY_NAME.items()
    }
    monkeypatch.setattr(backends, "_BY_NAME", everywhere)
    with counting_driver() as counting:
        yield counting


def train(mask, count: int, *, groups=1, steps=4, dtype=F32, misaligned=0, seed=0, **options) -> None:
    """Steps of FusedGradDropAdamW in which whatever may change does: gradients are new tensors, lr is another float,
    the epoch advances every other step, and p with it.
    """
    sizes = shapes_of_a_transformer(count)
    new = lambda size, shift: torch.randn(size + shift, dtype=dtype)[shift:]
    named = [(f"weight{i}", torch.nn.Parameter(new(size, int(i < misaligned)))) for i, size in enumerate(sizes)]
    given = [{"params": named[i::groups], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 * i} for i in range(groups)]
    if isinstance(mask, FixedMask):
        mask = FixedMask({name: torch.rand(param.shape) < 0.5 for name, param in named})
    optimizer = FusedGradDropAdamW(given, mask=mask, backend="triton", seed=seed, **options)
    for step in range(steps):
        held = [param.grad for _, param in named]  # so that the new ones lie elsewhere
        for _, param in named:
            param.grad = new(param.numel(), 0)
        del held
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        optimizer.set_epoch(step // 2)
        optimizer.step()


MASKS = {
    "none": None,
    "every step": GradDrop(LinearAnneal(epochs=5)),
    "gaussian": GaussianGradDrop(0.3),
    "buckets": GradDropEpoch(5, storage="recompute"),
    "planes": GradDropEpoch(5, storage="bitpacked"),
    "fixed": FixedMask({"": torch.ones(1, dtype=torch.bool)}),
}


@pytest.mark.parametrize("mask", MASKS)
def test_one_compilation_and_one_launch(mask, driver):
    """Two runs of other seeds, groups and numbers of tensors; behind an odd number of rows lie the hyper-parameters."""
    for seed, (groups, count) in enumerate(((3, 399), (1, 20))):
        driver.launches.clear()
        train(MASKS[mask], count, groups=groups, seed=seed)
        assert [name for name, _ in driver.launches] == ["prologue_kernel", "masked_adamw_kernel"] * 4
        chunks = sum(-(-size // CHUNK) for size in shapes_of_a_transformer(count))
        assert {programs for _, programs in driver.launches} == {count, chunks}
    assert compile_keys() == {"update": 1, "prologue": 1}


@pytest.mark.parametrize(
    "options, kernels",
    [
        ({}, {"update": 1, "prologue": 1}),
        ({"max_grad_norm": 1.0}, {"update": 1, "prologue": 1, "norm": 1}),
        ({"max_grad_norm": 1.0, "norm_after_mask": True}, {"update": 1, "prologue": 2, "norm": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_first_steps_of_a_process_compile_few_kernels(dtype, options, kernels, driver):
    """Each takes most of a second, for which a GPU waits. Of a model with a dense part and parameters of all sizes."""
    model = Encoder(dtype=dtype)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=GradDrop(0.2), backend="triton", **options)
    for step in range(3):
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()
    assert compile_keys() == kernels and sum(kernels.values()) <= 4


def test_launches_do_not_grow_with_the_number_of_tensors(driver):
    train(GradDrop(0.2), 4000, steps=2, groups=2)
    assert len(driver.launches) == 4
    assert compile_keys() == {"update": 1, "prologue": 1}


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_master_weights_and_random_rounding_are_one_compilation(options, driver):
    """Of tensors of one alignment, whatever their number."""
    for count in (20, 7):
        train(GradDrop(0.2), count, steps=2, dtype=BF16, **options)
    assert [name for name, _ in driver.launches] == ["prologue_kernel", "masked_adamw_kernel"] * 4
    assert compile_keys() == {"update": 1, "prologue": 1}


def test_the_norm_is_one_launch(driver):
    """After the scalars that its masks need. Other gradients, numbers of tensors and steps: no other compilation."""
    for count in (20, 399):
        sizes = shapes_of_a_transformer(count)
        batch = TensorBatch(torch.device("cpu"), F32, F32, hyper_rows=[i % 2 for i in range(count)])
        for tensors in (batch.params, batch.exp_avgs, batch.exp_avg_sqs, batch.grads):
            tensors.extend(map(torch.zeros, sizes))
        batch.steps, batch.keys = [torch.zeros(()) for _ in sizes], list(range(count))
        batch.max_exp_avg_sqs = batch.mask_words = [None] * count
        batch.layouts = [RowBlock.whole(size) for size in sizes]
        plans = MaskPlan("bernoulli", threshold=1000, scale=65536 / 64536), MaskPlan("keep")
        batch.hypers = [Hyper(1e-3, 0.9, 0.99, 1e-8, 0.1, False, False, plan) for plan in plans]
        for masked in (True, False):
            backend.sum_of_squares(batch, masked)
    assert [name for name, _ in driver.launches] == ["prologue_kernel", *["sum_of_squares_kernel"] * 2] * 2
    assert compile_keys() == {"prologue": 1, "norm": 2}


def test_misaligned_tensors_have_a_launch_of_their_own(driver):
    train(GradDrop(0.2), 40, steps=3, misaligned=7, dtype=BF16)
    assert [name for name, _ in driver.launches] == ["prologue_kernel", *["masked_adamw_kernel"] * 2] * 3
    assert compile_keys() == {"update": 2, "prologue": 1}


def test_numbers_of_buckets_are_no_constants(driver):
    """Triton compiles multiples of 16 anew where an argument may be specialised."""
    for epochs in (5, 16):
        train(GradDropEpoch(epochs, storage="recompute"), 5, steps=2)
    assert compile_keys() == {"update": 1, "prologue": 1}


def test_a_launch_on_a_gpu_has_a_block_of_its_warps(monkeypatch):
    """Eight elements a thread, whatever the size of a warp: with four, 16-bit tensors would exchange elements."""
    for threads, block in ((32, 1024), (64, 2048)):
        properties = type("properties", (), {"warp_size": threads})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        launch.block_of.cache_clear()
        assert launch.block_of(torch.device("cuda", 0)) == block
    launch.block_of.cache_clear()
