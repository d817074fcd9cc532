"""A kernel -> C++: one function that runs a thread up to where it meets others, and goes on there when called again.

Registers are members of a struct, so that they outlast the stop. Every access and every stop has the number of its
instruction, by which errors name it.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .instructions import Emitter, UnknownInstruction, c_type
from .parse import Function, Instruction, Module


class Translation(NamedTuple):
    """``texts``: the kernel's instructions by number; ``offsets``: (offset, size) of each parameter."""

    texts: list[str]
    offsets: list[tuple[int, int]]
    shared_bytes: int
    meets: bool


def translate(module: Module, entry: str, in_step: bool = False) -> tuple[str, Translation]:
    """Returns the C++ of an entry and of the functions that it calls, and what a launch needs to know.

    ``in_step``: the threads of a warp meet before they store to global memory. A program of one warp may rely on it.
    """
    kernel = module.function(entry)
    shared, shared_bytes = _laid_out(module.shared)
    offsets, _ = _laid_out(kernel.parameters)
    addresses = {name: f"{offset}u" for name, offset in shared.items()}
    addresses |= {name: f"(uint64_t)P + {offset}" for name, offset in offsets.items()}
    body = _Body(kernel, addresses, in_step, "return T.meet(kDone, 0)")
    code = body.code()
    called = "".join(_callee(module.function(name)) for name in sorted(body.called))
    source = f"""#include "machine.h"
using namespace ptx;
{called}
struct Registers {{
{_declared(kernel.registers)}}};
extern "C" const uint64_t register_bytes = sizeof(Registers);
extern "C" void kernel(Thread& T, Registers& R, const char* P) {{
switch (T.instruction) {{
case 0:
{code}
}}
return T.meet(kDone, 0);
}}
"""
    sizes = [(offsets[each.name], each.size) for each in kernel.parameters]
    return source, Translation(body.texts, sizes, shared_bytes, body.stops > 0)


def _laid_out(variables) -> tuple[dict[str, int], int]:
    """({name: offset}, bytes of all)."""
    offsets, end = {}, 0
    for name, _, size, alignment in variables:
        end = -(-end // alignment) * alignment
        offsets[name] = end
        end += size
    return offsets, end


def _declared(registers: dict[str, str]) -> str:
    by_type: dict[str, list[str]] = {}
    for name, type_ in registers.items():
        by_type.setdefault("uint8_t" if type_ == "pred" else c_type(f"b{type_[1:]}"), []).append(_variable(name))
    return "".join(f"  {type_} {', '.join(names)};\n" for type_, names in by_type.items())


def _variable(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


def _callee(function: Function) -> str:
    """A function that kernels call. It may neither stop nor have memory of its own."""
    (returned,) = function.returned
    function.registers |= {each.name: each.type for each in (returned, *function.parameters)}
    body = _Body(function, {}, False, f"return R.{_variable(returned.name)}")
    code = body.code()
    if body.stops or body.called:
        raise UnknownInstruction(f"{function.name}: a function that stops or calls another")
    names = [_variable(each.name) for each in function.parameters]
    return f"""static uint64_t {_variable(function.name)}({", ".join(f"uint64_t {name}" for name in names)}) {{
struct {{
{_declared(function.registers)}}} R;
{" ".join(f"R.{name} = {name};" for name in names)}
{code}
}}
"""


@dataclass
class _Body:
    """The translation of one function's body, and the names in it."""

    function: Function
    addresses: dict[str, str]
    in_step: bool
    leave: str
    texts: list[str] = field(default_factory=lambda: ["the beginning"])
    called: set[str] = field(default_factory=set)
    stops: int = 0

    def register(self, name: str) -> str | None:
        return f"R.{_variable(name)}" if name in self.function.registers else None

    def address(self, name: str) -> str | None:
        return self.addresses.get(name)

    def meet(self, why: str, value: str = "0") -> str:
        self.stops += 1
        at = len(self.texts) - 1
        return f"return T.meet({why}, {at}, {value}); case {at}:;"

    def code(self) -> str:
        return "\n".join(self._line(each) for each in self.function.body)

    def _line(self, each: Instruction | str) -> str:
        if isinstance(each, str):
            return f"{_variable(each)}: ;"
        step = ""
        if self.in_step and each.opcode.startswith("st.global"):
            self.texts.append(each.text)
            step = self.meet("kStep")
        self.texts.append(each.text)
        guard = f"if ({each.guard.replace('%', 'R.')}) " if each.guard else ""
        return f"{step}{guard}{{ {self._statement(each)} }}"

    def _statement(self, each: Instruction) -> str:
        if each.opcode in ("bra", "bra.uni"):
            return f"goto {_variable(each.operands[0])};"
        if each.opcode in ("ret", "exit"):
            return f"{self.leave};"
        if each.opcode == "call.uni":
            target, name, arguments = (operand.strip("() ") for operand in each.operands)
            self.called.add(name)
            values = [self.register(token.strip()) for token in arguments.split(",")]
            return f"{self.register(target)} = {_variable(name)}({', '.join(values)});"
        return Emitter(self, each, len(self.texts) - 1).emit()
