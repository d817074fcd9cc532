"""Reads the machine code of a compiled kernel: basic blocks, and the path of a full block of elements through them.

Takes the JSON of nvdisasm, which Triton brings with it. Nothing runs, and no GPU is needed.
"""

import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

INSTRUCTION_BYTES = 16
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "BAR", "ATOMS")  # needed by a change of layout between threads
LOCAL = ("LDL", "STL")  # spilled registers
_ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BREAK")
_PIPES = {
    "FMA": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I"),
    "MUFU": ("MUFU",),
    "memory": ("LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "LD", "ST", "LDC", "LDSM", "STSM"),
    "conversion": ("F2F", "F2I", "I2F", "I2FP", "FRND", "POPC"),
    "control": ("BRA", "BRX", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BAR", "NOP", "WARPSYNC", "BREAK", "JMP", "BMOV"),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    predicate: str  # "" if it always runs

    @property
    def name(self) -> str:
        """The opcode without its modifiers: LDG for LDG.E.128."""
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Width in bytes of a memory access per thread."""
        modifiers = self.opcode.split(".")[1:]
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[modifier] for modifier in modifiers if modifier in widths), 4)

    @property
    def target(self) -> int | None:
        """The address that a branch within the function goes to."""
        literals = re.findall(r"0x[0-9a-f]+", self.operands)
        return int(literals[-1], 16) if self.name in ("BRA", "JMP") and literals else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: it has a predicate, before it or among its operands (BRA P0, ...; BRA.U
        UP0).
        """
        return bool(self.predicate) or bool(re.search(r"\bU?P\d", self.operands))

    @property
    def pipe(self) -> str:
        """The unit that executes it. IMAD has its own pipe, half as wide as FMA's; U... run once per warp."""
        if self.name == "IMAD":
            parts = self.opcode.split(".")
            if "MOV" in parts or "SHL" in parts:  # moves, which the assembler puts wherever there is room
                return "IMAD"
            return next((f"IMAD.{kind}" for kind in ("WIDE", "HI") if kind in parts), "IMAD")
        for pipe, names in _PIPES.items():
            if self.name in names:
                return pipe
        if self.name[0] == "D" and self.name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
            return "FP64"
        return "uniform" if self.name.startswith("U") else "ALU"


class Kernel:
    """A function of a cubin.

    Args:
        cubin: the compiled module.
        name: the function's name.
        tools: folder with nvdisasm and cuobjdump.
        folder: where to write the file that these read.
    """

    def __init__(self, cubin: bytes, name: str, tools: Path, folder: Path):
        path = folder / f"{name}.cubin"
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", path)
        found = re.search(rf"Function {name}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        self.registers, self.stack, self.shared, self.local = map(int, found.groups())
        functions = json.loads(_run(tools / "nvdisasm", "-json", path))[1]
        listing = next(entry for entry in functions if entry["function-name"] == name)["sass-instructions"]
        self.instructions = [
            Instruction(INSTRUCTION_BYTES * place, entry["opcode"], entry.get("operands", ""),
                        entry.get("predicate", "").replace("@PT", ""))
            for place, entry in enumerate(listing)
        ]  # fmt: skip
        self.blocks = self._split()

    def _split(self) -> dict[int, list[Instruction]]:
        """Splits the code into basic blocks, by the address of their first instruction."""
        starts = {0}
        for instruction in self.instructions:
            if instruction.name in _ENDS:
                starts.add(instruction.address + INSTRUCTION_BYTES)
            if instruction.target is not None:
                starts.add(instruction.target)
        blocks: dict[int, list[Instruction]] = {}
        for instruction in self.instructions:
            if instruction.address in starts:
                blocks[instruction.address] = []
                block = blocks[instruction.address]
            block.append(instruction)
        return blocks

    def successors(self, block: int) -> list[int]:
        """Returns the blocks that may come next, without subroutines: those are the rare cases of sqrt and division."""
        last = self.blocks[block][-1]
        following = last.address + INSTRUCTION_BYTES
        found = [] if last.target is None else [last.target]
        if last.name not in ("EXIT", "RET", "BRA", "JMP", "BRX") or last.conditional:
            found.append(following)
        return [place for place in found if place in self.blocks and not self._calls(place)]

    def _calls(self, block: int) -> bool:
        return any(instruction.name == "CALL" for instruction in self.blocks[block])

    @cached_property
    def _graph(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Holds (reachable blocks, each after its successors; edges that close a loop)."""
        order, closing, state = [], set(), {0: "open"}
        stack = [(0, iter(self.successors(0)))]
        while stack:
            block, following = stack[-1]
            for place in following:
                if state.get(place) == "open":
                    closing.add((block, place))
                elif place not in state:
                    state[place] = "open"
                    stack.append((place, iter(self.successors(place))))
                    break
            else:
                state[block] = "done"
                order.append(block)
                stack.pop()
        return order, closing

    @cached_property
    def _loop(self) -> int | None:
        """First block of the loop over blocks of elements: the loop that stores most without a predicate.

        None if there is no loop.
        """
        heads = {head for _, head in self._graph[1]}
        return max(heads, key=lambda head: self._way(head, self._ends(head))[0], default=None)

    def _ends(self, head: int) -> set[int]:
        return {block for block, to in self._graph[1] if to == head}

    def _way(self, begin: int, ends: set[int]) -> tuple[int, int, list[int]]:
        """Finds the path from a block to one of the ends that stores the most bytes without a predicate: that of a full
        block of elements. Of several it takes the shortest. Returns (bytes, -instructions, blocks).
        """
        order, closing = self._graph
        best: dict[int, tuple[int, int, list[int]]] = {}
        for block in order:
            stored = sum(i.bytes for i in self.blocks[block] if i.name == "STG" and not i.predicate)
            following = [place for place in self.successors(block) if (block, place) not in closing and place in best]
            after = max((best[place] for place in following), key=lambda way: way[:2], default=None)
            if block in ends:
                after = (0, 0, [])
            if after is not None:
                best[block] = (stored + after[0], after[1] - len(self.blocks[block]), [block, *after[2]])
        return best.get(begin, (-1, 0, []))

    @cached_property
    def prologue(self) -> list[Instruction]:
        """The code before the loop, if there is one."""
        if self._loop is None:
            return []
        before = {block for block in self.blocks if self._loop in self.successors(block)} - self._ends(self._loop)
        return self._code(self._way(0, before)[2])

    @cached_property
    def body(self) -> list[Instruction]:
        """One pass of the loop with a full block of elements; without a loop the whole program."""
        if self._loop is not None:
            return self._code(self._way(self._loop, self._ends(self._loop))[2])
        return self._code(self._way(0, {block for block in self.blocks if not self.successors(block)})[2])

    def _code(self, path: list[int]) -> list[Instruction]:
        return [i for block in path for i in self.blocks[block] if i.name not in ("NOP", "EXIT")]

    def accesses(self, name: str) -> Counter:
        """Counts unpredicated LDG or STG of the loop body: {bytes per thread: number}."""
        return Counter(i.bytes for i in self.body if i.name == name and not i.predicate)

    def pipes(self) -> Counter:
        """Counts the instructions of the loop body per executing unit."""
        return Counter(i.pipe for i in self.body)


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
