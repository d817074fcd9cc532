"""The meaning of every instruction that occurs, as C++ on the registers' bits (machine.h has what C++ lacks).

An opcode that no row of the table matches as a whole is an error.
"""

import re
from collections.abc import Callable
from typing import Protocol

from .parse import Instruction, size_of


class UnknownInstruction(Exception):
    """It has the instruction's text."""


class Names(Protocol):
    """What a translation knows of the names in operands."""

    def register(self, name: str) -> str | None:
        """The C++ variable of a register, also of a parameter of a call, or None."""

    def address(self, name: str) -> str | None:
        """The C++ number of a piece of shared memory (its offset) or of a kernel's parameter (its address)."""

    def meet(self, why: str, value: str = "0") -> str:
        """C++ that stops the thread at this instruction."""


SPECIAL = {
    **{f"%{name}.x": f"T.{name}" for name in ("tid", "ctaid", "ntid", "nctaid")}, "%laneid": "(T.tid & 31)",
}  # fmt: skip
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_OPPOSITE = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "fma": "f", "sqrt": "s"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}


def c_type(type_: str) -> str:
    """Of the bits of a value; signed for ``s32``."""
    return "bool" if type_ == "pred" else f"{'' if type_[0] == 's' else 'u'}int{8 * size_of(type_)}_t"


class Reader:
    """Operands of one instruction as C++."""

    def __init__(self, names: Names, instruction: Instruction, at: int):
        self.names, self.operands, self.at, self.text = names, instruction.operands, at, instruction.text

    def unknown(self) -> UnknownInstruction:
        return UnknownInstruction(self.text)

    def raw(self, token: str, type_: str) -> str:
        """The bits of a register or constant, in whatever width it has."""
        if token.startswith("!"):
            return f"!{self.raw(token[1:], type_)}"
        if token in SPECIAL:
            return SPECIAL[token]
        found = self.names.register(token) or self.names.address(token)
        if found is not None:
            return found
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", token):
            return f"0x{token[2:]}u"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token) and type_[0] != "f":
            return f"0x{int(token.rstrip('U'), 0) % 2**64:x}u"
        raise self.unknown()

    def value(self, token: str, type_: str) -> str:
        """The value as a C++ number of the type."""
        bits = self.raw(token, type_)
        if type_ in ("f32", "f64"):
            return f"{type_}({bits})"
        return bits if type_ == "pred" else f"({c_type(type_)})({bits})"

    def assign(self, token: str, type_: str, value: str) -> str:
        """Writes the bits of a C++ number of the type into a register, extended by its sign if it has one."""
        if token == "_":
            return ""
        target = self.names.register(token)
        if target is None:
            raise self.unknown()
        return f"{target} = {f'bits({value})' if type_ in ('f32', 'f64') else f'({c_type(type_)})({value})'};"

    def place(self, token: str) -> tuple[str, int]:
        """(name, offset) of an address in brackets."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", token)
        if match is None:
            raise self.unknown()
        return match[1], int(match[2] or 0)


def _parts(token: str) -> list[str]:
    return [part.strip() for part in token.strip("{} ").split(",")]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _of_floats(name: str, mode: str, values: list[str]) -> str:
    if mode != "n":
        values = [*values, *["0"] * (3 - len(values))]
        return f"rounded('{mode}', '{_SIGNS[name]}', {', '.join(values)})"
    if name in ("fma", "sqrt"):
        return f"{'fused' if name == 'fma' else 'root'}({', '.join(values)})"
    return f"{values[0]} {_SIGNS[name]} {values[1]}"


def _float(reader: Reader, name: str, mode: str | None, type_: str) -> str:
    values = [reader.value(token, type_) for token in reader.operands[1:]]
    return reader.assign(reader.operands[0], type_, _of_floats(name, mode or "n", values))


def _two_floats(reader: Reader, name: str) -> str:
    wide = [reader.raw(token, "b64") for token in reader.operands[1:]]
    halves = [
        f"bits({_of_floats(name, 'n', [f'f32({half}({each}))' for each in wide])})" for half in ("low", "high")
    ]
    return reader.assign(reader.operands[0], "b64", f"pair({', '.join(halves)})")


def _extreme(reader: Reader, name: str, type_: str) -> str:
    a, b = (reader.value(token, type_) for token in reader.operands[1:])
    if type_[0] == "f":
        return reader.assign(reader.operands[0], type_, f"{name}imum({a}, {b})")
    return reader.assign(reader.operands[0], type_, f"{a} {'<' if name == 'min' else '>'} {b} ? {a} : {b}")


def _sign(reader: Reader, name: str, type_: str) -> str:
    bits, sign = reader.raw(reader.operands[1], type_), f"(({c_type('b' + type_[1:])})1 << {type_[1:]} - 1)"
    return reader.assign(reader.operands[0], "b" + type_[1:], f"{bits} ^ {sign}" if name == "neg" else f"{bits} & ~{sign}")


def _integer(reader: Reader, name: str, type_: str) -> str:
    # what does not depend on signs wraps around, as unsigned numbers do
    type_ = type_ if name in ("div", "rem") else f"u{type_[1:]}"
    a, b = (reader.value(token, type_) for token in reader.operands[1:3])
    operation = "%" if name == "rem" else _SIGNS[name]
    return reader.assign(reader.operands[0], type_, f"{a} {operation} {b}")


def _product(reader: Reader, name: str, part: str, sign: str, width: str) -> str:
    narrow, wide = f"{sign}{width}", f"{sign}{2 * int(width)}"
    if part == "lo":
        narrow = wide = f"u{width}"
    result = wide if part == "wide" else narrow
    wide_type = c_type(wide) if wide[1:] != "128" else {"s": "__int128", "u": "unsigned __int128"}[sign]
    a, b = (f"({wide_type}){reader.value(token, narrow)}" for token in reader.operands[1:3])
    product = f"{a} * {b}" + (f" >> {width}" if part == "hi" else "")
    if name == "mad":
        unsigned = c_type(f"u{result[1:]}")
        product = f"({unsigned})({product}) + ({unsigned}){reader.value(reader.operands[3], result)}"
    return reader.assign(reader.operands[0], result, product)


def _bitwise(reader: Reader, name: str, type_: str) -> str:
    values = [reader.value(token, type_) for token in reader.operands[1:]]
    if name == "not":
        value = f"{'!' if type_ == 'pred' else '~'}{values[0]}"
    else:
        value = f"{values[0]} {_BITWISE[name]} {values[1]}"
    return reader.assign(reader.operands[0], type_, value)


def _shift(reader: Reader, name: str, type_: str) -> str:
    value, by = reader.value(reader.operands[1], type_), reader.value(reader.operands[2], "u32")
    return reader.assign(reader.operands[0], type_, f"shifted_{'left' if name == 'shl' else 'right'}({value}, {by})")


def _call_of(function: str, *types: str) -> Callable[..., str]:
    """A row for a function of machine.h; ``types``: of the result and of the arguments."""

    def emit(reader: Reader, *groups: str) -> str:
        values = [reader.value(token, type_) for token, type_ in zip(reader.operands[1:], types[1:], strict=True)]
        return reader.assign(reader.operands[0], types[0], f"{function}({', '.join(values)})")

    return emit


def _leading_zeros(reader: Reader) -> str:
    value = reader.value(reader.operands[1], "b32")
    return reader.assign(reader.operands[0], "b32", f"{value} ? __builtin_clz({value}) : 32")


# --- comparisons, moves, conversions ----------------------------------------------------------------------------------


def _compare(reader: Reader, comparison: str, with_: str | None, type_: str) -> str:
    a, b = (reader.value(token, type_) for token in reader.operands[1:3])
    if type_[0] != "f" and comparison in _COMPARISONS:
        value = f"{a} {_COMPARISONS[comparison]} {b}"
    elif comparison in ("num", "nan"):
        value = f"{'!' if comparison == 'nan' else ''}({a} == {a} && {b} == {b})"
    elif comparison in ("ne", "equ"):  # C++ has the other one of each: a NaN is not equal
        value = f"{'!' if comparison == 'equ' else ''}({a} < {b} || {a} > {b})"
    elif comparison in _COMPARISONS or comparison == "neu":
        value = f"{a} {_COMPARISONS[comparison[:2]]} {b}"
    elif comparison[-1] == "u" and comparison[:-1] in _OPPOSITE:
        value = f"!({a} {_OPPOSITE[comparison[:-1]]} {b})"
    else:
        raise reader.unknown()
    if with_:
        value = f"({value}) {_BITWISE[with_]} {reader.value(reader.operands[3], 'pred')}"
    return reader.assign(reader.operands[0], "pred", value)


def _select(reader: Reader, type_: str) -> str:
    type_ = f"b{type_[1:]}"
    _, a, b, which = reader.operands
    value = f"{reader.value(which, 'pred')} ? {reader.value(a, type_)} : {reader.value(b, type_)}"
    return reader.assign(reader.operands[0], type_, value)


def _move(reader: Reader, type_: str) -> str:
    target, source = reader.operands
    bits = type_ if type_ == "pred" else f"b{type_[1:]}"
    if target.startswith("{"):
        parts = _parts(target)
        width = 8 * size_of(type_) // len(parts)
        return f"{{ const {c_type(bits)} whole = {reader.raw(source, bits)}; " + " ".join(
            reader.assign(part, f"b{width}", f"whole >> {i * width}") for i, part in enumerate(parts)
        ) + " }"  # fmt: skip
    if source.startswith("{"):
        parts = _parts(source)
        width = 8 * size_of(type_) // len(parts)
        joined = " | ".join(
            f"({c_type(bits)}){reader.value(part, f'b{width}')} << {i * width}" for i, part in enumerate(parts)
        )
        return reader.assign(target, bits, joined)
    return reader.assign(target, bits, reader.raw(source, bits))


def _convert(reader: Reader, mode: str | None, to: str, source: str) -> str:
    """Between integers of any kind, and from numbers that float32 or float64 hold."""
    value = reader.value(reader.operands[1], source)
    if to[0] == "f":
        if (mode == "rn") == (to == "f64" and source == "f32"):
            raise reader.unknown()  # exact, or to be rounded
        return reader.assign(reader.operands[0], to, f"({'float' if to == 'f32' else 'double'}){value}")
    if source[0] == "f":
        if mode != "rzi":
            raise reader.unknown()
        return reader.assign(reader.operands[0], to, f"to_integer<{c_type(to)}>({value})")
    if mode:
        raise reader.unknown()
    return reader.assign(reader.operands[0], to, value)


def _narrow(reader: Reader, mode: str, half: str, two: str | None) -> str:
    values = [f"{_NARROW[half]}({reader.value(token, 'f32')}, '{mode}')" for token in reader.operands[1:]]
    value = f"(uint32_t){values[0]} << 16 | {values[1]}" if two else values[0]
    return reader.assign(reader.operands[0], "b32" if two else "b16", value)


def _widen(reader: Reader, to: str, half: str) -> str:
    bits = reader.value(reader.operands[1], "b16")
    return reader.assign(reader.operands[0], to, f"({'float' if to == 'f32' else 'double'}){_WIDEN[half]}({bits})")


_WIDEN = {"f16": "from_half", "bf16": "from_brain"}
_NARROW = {"f16": "to_half", "bf16": "to_brain"}

# --- memory, and where threads meet -----------------------------------------------------------------------------------


def _pointer(reader: Reader, token: str, space: str | None, size: int, access: str) -> str:
    name, offset = reader.place(token)
    base = reader.raw(name, "b64")
    if space == "param":
        if reader.names.address(name) is not None:
            return f"(char*)({base} + {offset})"
        return f"T.parameter({base} + {offset}, {size}, {reader.at})"
    return f"T.{space or 'global'}({base} + {offset}, {size}, {access}, {reader.at})"


def _load(reader: Reader, space: str | None, type_: str) -> str:
    parts = _parts(reader.operands[0])
    name, _ = reader.place(reader.operands[1])
    if space == "param" and reader.names.register(name) and not name.startswith("%"):  # what a call has returned
        return reader.assign(parts[0], f"b{type_[1:]}", reader.raw(name, type_))
    loaded = c_type(type_ if type_[0] == "s" else f"b{type_[1:]}")
    at = _pointer(reader, reader.operands[1], space, size_of(type_) * len(parts), "kRead")
    values = " ".join(f"{reader.names.register(part)} = at[{i}];" for i, part in enumerate(parts) if part != "_")
    return f"{{ const {loaded}* at = (const {loaded}*){at}; {values} }}"


def _store(reader: Reader, space: str | None, type_: str) -> str:
    parts, stored = _parts(reader.operands[1]), f"b{type_[1:]}"
    name, _ = reader.place(reader.operands[0])
    if space == "param":
        return reader.assign(name, stored, reader.raw(parts[0], stored))
    at = _pointer(reader, reader.operands[0], space, size_of(type_) * len(parts), "kWrite")
    values = " ".join(f"at[{i}] = {reader.value(part, stored)};" for i, part in enumerate(parts))
    return f"{{ {c_type(stored)}* at = ({c_type(stored)}*){at}; {values} }}"


def _atomic_add(reader: Reader, type_: str) -> str:
    target, place, value = reader.operands
    at = _pointer(reader, place, "global", size_of(type_), "kAtomic")
    old = reader.assign(target, type_, "*at")
    return f"{{ auto at = ({c_type(type_)}*){at}; const auto with = {reader.value(value, type_)}; {old} *at += with; }}"


def _shuffle(reader: Reader) -> str:
    target, value, lane, clamp, mask = reader.operands
    target, _, found = target.partition("|")
    numbers = ", ".join(reader.value(token, "u32") for token in (lane, clamp, mask))
    meet = reader.names.meet("kShuffle", reader.raw(value, "b32"))
    found = reader.assign(found, "pred", "1") if found else ""
    return f"T.exchange({numbers}, {reader.at}); {meet} {reader.assign(target, 'b32', 'T.value')} {found}"


def _barrier(reader: Reader, which: str | None) -> str:
    if which is None:
        if reader.operands != ("0",):
            raise reader.unknown()
        return reader.names.meet("kBarrier")
    target, barrier, value = reader.operands
    if barrier != "0":
        raise reader.unknown()
    meet = reader.names.meet("kBarrier", f"{reader.value(value, 'pred')}")
    return f"T.any = {int(which == 'or')}; {meet} {reader.assign(target, 'pred', 'T.value')}"


_ROUNDING, _FLOAT, _INTEGER = r"\.r([nzmp])", r"\.(f32|f64)", r"\.([us](?:16|32|64))"
_ANY = r"\.([busf](?:8|16|32|64))"
_SPACE = r"(?:\.(global|shared|param))?"
_VECTOR = r"(?:\.v[24])?"
TABLE: list[tuple[str, Callable[..., str]]] = [
    (rf"(add|sub|mul)(?:{_ROUNDING})?{_FLOAT}", _float),
    (rf"(fma|div|sqrt){_ROUNDING}{_FLOAT}", _float),
    (r"(add|sub|mul|fma)\.rn\.f32x2", _two_floats),
    (r"(min|max)\.(f32|f64|[us]16|[us]32|[us]64)", _extreme),
    (rf"(neg|abs){_FLOAT}", _sign),
    (r"abs\.ftz\.f32", _call_of("flushed_magnitude", "f32", "f32")),
    (r"rcp\.approx\.ftz\.f64", _call_of("reciprocal", "f64", "f64")),
    (rf"(add|sub|div|rem){_INTEGER}", _integer),
    (r"(mul|mad)\.(lo|hi|wide)\.([us])(16|32|64)", _product),
    (r"neg\.s(32|64)", lambda reader, width: reader.assign(
        reader.operands[0], f"u{width}", f"0 - {reader.value(reader.operands[1], f'u{width}')}")),
    (r"(and|or|xor|not)\.(pred|b16|b32|b64)", _bitwise),
    (r"(shl)\.(b16|b32|b64)", _shift),
    (r"(shr)\.([bus](?:16|32|64))", _shift),
    (r"prmt\.b32", _call_of("permuted", "b32", "b32", "b32", "b32")),
    (r"bfe\.u32", _call_of("field", "u32", "u32", "u32", "u32")),
    (r"bfi\.b32", _call_of("with_field", "b32", "b32", "b32", "u32", "u32")),
    (r"clz\.b32", _leading_zeros),
    (r"setp\.([a-z]+)(?:\.(and|or|xor))?\.([busf](?:16|32|64))", _compare),
    (rf"selp{_ANY}", _select),
    (r"mov\.(pred|[busf](?:16|32|64))", _move),
    (r"cvta(?:\.to)?\.global\.u64", lambda reader: _move(reader, "b64")),
    (r"cvt\.rzi\.f64\.f64", _call_of("__builtin_trunc", "f64", "f64")),
    (r"cvt(?:\.(rn|rzi))?\.([us](?:8|16|32|64)|f32|f64)\.([us](?:8|16|32|64)|f32|f64)", _convert),
    (r"cvt\.r([nz])\.(f16|bf16)(x2)?\.f32", _narrow),
    (r"cvt\.(f32|f64)\.(f16|bf16)", _widen),
    (rf"ld{_SPACE}(?:\.cg)?{_VECTOR}{_ANY}", _load),
    (rf"st{_SPACE}{_VECTOR}{_ANY}", _store),
    (r"atom(?:\.global\.gpu\.acq_rel|\.acq_rel\.gpu\.global)\.add\.(u32)", _atomic_add),
    (r"shfl\.sync\.bfly\.b32", _shuffle),
    (r"bar(?:\.sync|\.red\.(or|and)\.pred)", _barrier),
]  # fmt: skip
_ROWS = [(re.compile(pattern), emit) for pattern, emit in TABLE]


def emit(names: Names, instruction: Instruction, at: int) -> str:
    """C++ of an instruction other than a branch, a call or a return; ``at``: its number in its function."""
    for pattern, row in _ROWS:
        match = pattern.fullmatch(instruction.opcode)
        if match:
            return row(Reader(names, instruction, at), *match.groups())
    raise UnknownInstruction(instruction.text)
