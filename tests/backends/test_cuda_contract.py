"""The machine code of the CUDA kernels: registers, spills, the width of memory accesses, instructions an element.

Read from the built library; needs cuobjdump and nvdisasm, no GPU.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import sass  # noqa: E402
from graddrop_kernels.backends import cuda  # noqa: E402
from graddrop_kernels.backends.batch import ROUND_MOMENTS, ROUND_PARAMS  # noqa: E402

LIBRARY = Path(cuda.__file__).resolve().parent.parent / "_cuda.so"
ARCHS = ("sm_80", "sm_90")
# Variant of csrc/cuda/thread_mask.h, in its order.
VARIANTS = (
    "plain", "factor", "draws", "draws_frozen", "buckets", "buckets_by_age", "bits", "bits_by_age",
    "draws_update", "buckets_update", "bits_update",
)  # fmt: skip
DTYPES = {"f": "float32", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# (parameters, gradients, moments, bits of Stochastic) of csrc/cuda/masked_adamw.h
TYPES = (
    ("float32", "float32", "float32", 0), ("float32", "float32", "bfloat16", 0),
    ("bfloat16", "bfloat16", "float32", 0), ("bfloat16", "bfloat16", "bfloat16", 0),
    ("float16", "float16", "float32", 0), ("float16", "float16", "float16", 0),
    ("float32", "bfloat16", "float32", 0), ("float32", "float16", "float32", 0),
    ("bfloat16", "bfloat16", "float32", ROUND_PARAMS), ("bfloat16", "bfloat16", "bfloat16", ROUND_PARAMS),
    ("float32", "float32", "bfloat16", ROUND_MOMENTS), ("bfloat16", "bfloat16", "bfloat16", ROUND_MOMENTS),
    ("bfloat16", "bfloat16", "bfloat16", ROUND_PARAMS | ROUND_MOMENTS),
)  # fmt: skip
WAYS = ("", "amsgrad", "cautious")  # both together are the general kernel's
ALL = list(product(VARIANTS, WAYS, TYPES))
ELEMENTS = 8  # of a thread in one turn
TURNS = 2  # of a block in a chunk

# Ceilings of instructions an element on the way of whole groups, what comes before the turns included: without amsgrad,
# and what amsgrad and cautious decay add. The largest of all dtypes on sm_80 and sm_90 by nvcc 13.0, plus 10 %. Bits:
# of one plane.
INSTRUCTIONS = {
    "plain": 55, "factor": 106, "draws": 72, "draws_frozen": 84, "buckets": 89, "buckets_by_age": 102,
    "bits": 74, "bits_by_age": 83, "draws_update": 75, "buckets_update": 80, "bits_update": 67,
}  # fmt: skip
WAY_INSTRUCTIONS = {"": 0, "amsgrad": 8, "cautious": 4}
# By bits of Stochastic: a Philox call for four elements and a rounding of each, two (with amsgrad three), both.
STOCHASTIC_INSTRUCTIONS = (0, 30, 41, 53)
# With amsgrad, ages, Gaussian factors or updates masked by drawn buckets, or without: two or three blocks of 256
# threads share 65536 registers.
REGISTERS = {True: 128, False: 80}
THREADS = 256
# The norm: one launch a mask kind and gradient dtype. Eight blocks share the registers, five, of Gaussian factors four,
# and of rows of any layout three.
NORM_VARIANTS = ("plain", "factor", "draws", "buckets", "bits")
NORM_REGISTERS = dict.fromkeys(NORM_VARIANTS, 48) | {"plain": 32, "factor": 64, "general": 80}


def tool(name: str) -> str | None:
    triton = find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if triton:
        folders.insert(0, Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next(filter(None, (shutil.which(name, path=str(folder)) for folder in folders)), shutil.which(name))


def run(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


class Instruction(sass.Instruction):
    @property
    def conditional(self) -> bool:
        """BRA.DIV leads to a slower shuffle, for lanes that do not come together."""
        return super().conditional or ".DIV" in self.opcode


class Kernel(sass.Kernel):
    """A function of an already disassembled module."""

    def __init__(self, registers: int, stack: int, shared: int, local: int, listing: list[dict]):
        self.registers, self.stack, self.shared, self.local = registers, stack, shared, local
        self.instructions = [
            Instruction(sass.INSTRUCTION_BYTES * place, entry["opcode"], entry.get("operands", ""),
                        entry.get("predicate", "").replace("@PT", ""))
            for place, entry in enumerate(listing)
        ]  # fmt: skip
        self.blocks = self._split()

    def _worth(self, block: int) -> int:
        """Leads the path through the loads and stores of full groups, past the division of gradients by a grad_scale
        and past the elements that fill no group.
        """
        worth = 0
        for i in self.blocks[block]:
            if i.name == "STG":
                worth += i.bytes if i.bytes >= 8 else -16
            elif i.name == "LDG" and i.bytes == 16:
                worth += 16
            elif i.opcode.startswith("MUFU.RCP"):
                worth -= 12
        return worth

    def _calls(self, block: int) -> bool:
        """Not counting the predicated CALL with which ptxas leaves a loop on sm_80."""
        return any(i.name == "CALL" and not i.predicate for i in self.blocks[block])

    def _way(self, begin: int, ends: set[int]) -> tuple[int, int, list[int]]:
        order, closing = self._graph
        best: dict[int, tuple[int, int, list[int]]] = {}
        for block in order:
            following = [place for place in self.successors(block) if (block, place) not in closing and place in best]
            after = max((best[place] for place in following), key=lambda way: way[:2], default=None)
            if block in ends:
                after = (0, 0, [])
            if after is not None:
                best[block] = (
                    self._worth(block) + after[0], after[1] - len(self.blocks[block]), [block, *after[2]]
                )  # fmt: skip
        return best.get(begin, (-1, 0, []))

    @property
    def instructions_per_element(self) -> float:
        return (len(self.prologue) + TURNS * len(self.body)) / (TURNS * ELEMENTS)

    def wide(self, name: str) -> Counter:
        """Accesses of 8 and 16 bytes in a turn: {bytes: number}. Predicates only say whether a group is whole."""
        return Counter(i.bytes for i in self.body if i.name == name and i.bytes >= 8)


@pytest.fixture(scope="session")
def kernels(request, tmp_path_factory) -> dict[str, Kernel]:
    """Every function of the library for one architecture, by its mangled name: disassembled once a session."""
    arch = request.param
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built; make test does so where nvcc is")
    tools = [tool("cuobjdump"), tool("nvdisasm")]
    if None in tools:
        pytest.skip("cuobjdump and nvdisasm are needed: they come with triton and with the CUDA toolkit")
    folder = tmp_path_factory.mktemp(arch)
    subprocess.run([tools[0], "-xelf", arch, str(LIBRARY)], cwd=folder, check=True, capture_output=True)
    if not list(folder.glob("*.cubin")):
        pytest.skip(f"{LIBRARY.name} was built without {arch}; make test builds it with")
    found = {}
    for cubin in folder.glob("*.cubin"):
        usage = re.findall(
            r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", run(tools[0], "-res-usage", cubin)
        )
        listings = {
            entry["function-name"]: entry["sass-instructions"] for entry in json.loads(run(tools[1], "-json", cubin))[1]
        }
        found |= {name: Kernel(*map(int, numbers), listings[name]) for name, *numbers in usage}
    return found


def aligned(kernels) -> dict[tuple, Kernel]:
    """{(variant, an entry of WAYS, an entry of TYPES): kernel}."""
    found = {}
    one = r"(f|NS_\w+?E|S\d?_)"
    pattern = rf"aligned_kernelILNS_7VariantE(\d+)ELb([01])ELb([01])ENS_5TypesI{one}{one}{one}Li([0-3])EEEEEv"
    for name, kernel in kernels.items():
        match = re.search(pattern, name)
        if match:
            variant, amsgrad, cautious, *types, stochastic = match.groups()
            way = WAYS[int(amsgrad) + 2 * int(cautious)]
            # S2_: the 16-bit type named before
            sixteen_bit = next((each for each in types if each.startswith("NS_")), None)
            dtypes = [DTYPES[sixteen_bit if each.startswith("S") else each] for each in types]
            found[VARIANTS[int(variant)], way, (*dtypes, int(stochastic))] = kernel
    return found


def norms(kernels, what: str = "norm") -> dict[tuple, Kernel]:
    """{(variant or "general", gradient dtype): kernel}."""
    found = {}
    for name, kernel in kernels.items():
        pattern = rf"(?:aligned_{what}_kernelILNS_7VariantE(\d)E|general_{what}_kernelI)(f|NS_\w+?E)EEv"
        match = re.search(pattern, name)
        if match:
            found[VARIANTS[int(match[1])] if match[1] else "general", DTYPES[match[2]]] = kernel
    return found


def masks(kernels) -> dict[tuple, Kernel]:
    """The kernels that mask gradients in place, as norms()."""
    return norms(kernels, "masks")


every_arch = pytest.mark.parametrize("kernels", ARCHS, indirect=True)


@every_arch
def test_every_variant_is_there(kernels):
    assert sorted(aligned(kernels)) == sorted(ALL)
    assert sum("general_kernel" in name for name in kernels) == len(TYPES)
    assert sorted(norms(kernels)) == sorted(product((*NORM_VARIANTS, "general"), BYTES))
    assert sorted(masks(kernels)) == sorted(norms(kernels))
    for name in ("prologue", "keep_mask", "planes"):
        assert sum(f"{name}_kernel" in found for found in kernels) == 1, name


@every_arch
def test_nothing_spills_and_registers_are_bounded(kernels):
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.local) == (0, 0), name
        assert not any(i.name in sass.LOCAL for i in kernel.instructions), name
    for (variant, way, types), kernel in aligned(kernels).items():
        many = way == "amsgrad" or variant in ("factor", "buckets_update") or variant.endswith("by_age")
        assert kernel.registers <= REGISTERS[many], (variant, way, types)
    for (variant, dtype), kernel in norms(kernels).items():
        assert kernel.registers <= NORM_REGISTERS[variant], (variant, dtype, kernel.registers)
    for (variant, dtype), kernel in masks(kernels).items():
        assert kernel.registers <= NORM_REGISTERS[variant], (variant, dtype, kernel.registers)


@every_arch
def test_no_shared_memory_no_barrier_no_float64(kernels):
    """Beside float32, lanes exchange halves of their draws with two shuffles a turn; nothing else meets."""
    for (variant, way, types), kernel in aligned(kernels).items():
        names = Counter(i.name for i in kernel.instructions)
        assert kernel.shared == 0 and not {"LDS", "STS", "BAR", "ATOMS", "RED", "ATOM"} & set(names)
        assert not [i for i in kernel.instructions if i.pipe == "FP64"]
        exchanges = variant.startswith(("draws", "buckets")) and "float32" in types
        shuffles = sum(i.name == "SHFL" for i in kernel.body)
        assert shuffles == (2 if exchanges else 0), (variant, way, types)
    prologue = next(kernel for name, kernel in kernels.items() if "prologue_kernel" in name)  # has what is looked for
    assert any(i.name == "BAR" for i in prologue.instructions) and any(i.pipe == "FP64" for i in prologue.instructions)


@every_arch
def test_memory_is_accessed_in_the_widest_pieces(kernels):
    """16 bytes a lane; 8 where a 16-bit tensor lies beside a float32 one. Copies of masters are not read, unless some
    of their elements may be frozen.
    """
    for (variant, way, types), kernel in aligned(kernels).items():
        param, grad, moments, _ = types
        amsgrad = way == "amsgrad"
        vector = 8 if param == moments != "float32" else 4
        groups = ELEMENTS // vector
        loads, stores = Counter(), Counter()
        loads[vector * BYTES[param]] += groups
        loads[vector * BYTES[grad]] += groups
        if grad != param:
            stores[vector * BYTES[grad]] += groups
            loads[vector * BYTES[grad]] += groups * (variant not in ("plain", "factor", "draws"))
        loads[vector * BYTES[moments]] += (2 + amsgrad) * groups
        stores[vector * BYTES[param]] += groups
        stores[vector * BYTES[moments]] += (2 + amsgrad) * groups
        if variant.endswith("by_age"):
            loads[16] += ELEMENTS  # the scalars of an element's bucket
        assert kernel.wide("LDG") == loads, (variant, way, types)
        assert kernel.wide("STG") == stores, (variant, way, types)
        assert not [i for i in kernel.body if i.name == "STG" and i.bytes < 8]


@every_arch
def test_instructions_per_element(kernels):
    for (variant, way, types), kernel in aligned(kernels).items():
        ceiling = INSTRUCTIONS[variant] + WAY_INSTRUCTIONS[way] + STOCHASTIC_INSTRUCTIONS[types[3]]
        assert 30 < kernel.instructions_per_element <= ceiling, (
            f"{variant}, {way}, {types}: {kernel.instructions_per_element:.1f}"
        )


@every_arch
def test_the_norm_reads_16_bytes_a_lane_before_it_adds(kernels):
    """All full loads of a thread are under way before the first square is added; squares are fused in float64."""
    for (variant, dtype), kernel in norms(kernels).items():
        if variant == "general":
            continue
        code = kernel.instructions
        loads = [i.address for i in code if i.name == "LDG" and i.bytes == 16]
        squares = [i.address for i in code if i.name == "DFMA"]
        assert len(loads) == TURNS * ELEMENTS * BYTES[dtype] // 16, (variant, dtype)
        assert len(squares) == TURNS * ELEMENTS + 1, (variant, dtype)  # one that fills no group
        assert max(loads) < min(squares), (variant, dtype)


@every_arch
def test_gradients_are_masked_16_bytes_a_lane(kernels):
    """All loads of a thread are under way before its first store. A launch that keeps nothing reads nothing."""
    for (variant, dtype), kernel in masks(kernels).items():
        if variant == "general":
            continue
        what, code = (variant, dtype), kernel.instructions
        loads = [i.address for i in code if i.name == "LDG" and i.bytes == 16]
        stores = [i.address for i in code if i.name == "STG" and i.bytes == 16]
        accesses = TURNS * ELEMENTS * BYTES[dtype] // 16
        assert len(stores) == accesses, what
        if variant == "plain":
            continue
        gradients = [address for address in loads if address < min(stores)]
        assert len(gradients) >= accesses, what
        assert not {"BAR", "LDS", "STS", "RED", "ATOM", "ATOMG"} & {i.name for i in code}, what


@every_arch
def test_the_norm_meets_only_to_add_up_its_sums(kernels):
    """Shared memory for one sum a thread; barriers and shared memory in no loop and not before the loads. The one
    atomic is an integer's: sums are stored, each in its place.
    """
    for (variant, dtype), kernel in norms(kernels).items():
        what, code = (variant, dtype), kernel.instructions
        names = Counter(i.name for i in code)
        meets = [i for i in code if i.name in ("BAR", "LDS", "STS")]
        assert kernel.shared in (8 * THREADS, 8 * THREADS + 1024), what  # 1024: what sm_90 keeps for itself
        last_load = max((i.address for i in code if i.name == "LDG" and i.bytes == 16), default=0)
        assert names["BAR"] == 5 and min(i.address for i in meets) > last_load, what
        loops = [(head, kernel.blocks[tail][-1].address) for tail, head in kernel._graph[1]]
        assert loops and not [i for i in meets for head, end in loops if head <= i.address <= end], what
        assert not {"RED", "ATOM", "ATOMS"} & set(names) and names["ATOMG"] == 1, what
        atomic = next(i for i in code if i.name == "ATOMG")
        assert ".ADD" in atomic.opcode and not re.search(r"\.F(16|32|64)|\.BF16", atomic.opcode), what
        assert Counter(i.bytes for i in code if i.name == "STG") == {8: 2, 4: 1}, what  # a sum, the total, the counter
        exchanges = variant in ("draws", "buckets") and dtype == "float32"
        assert bool(names["SHFL"]) == exchanges, what
