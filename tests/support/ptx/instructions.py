"""The meaning of every instruction that occurs, as C++. An opcode that no row matches as a whole is an error."""

import re

from .parse import Instruction, size_of


class UnknownInstruction(Exception):
    """It has the instruction's text."""


_FLOAT, _ANY_INTEGER, _WIDTH = r"(f32|f64)", r"([bus](?:16|32|64))", r"(8|16|32|64)"
_ALL = r"([bus](?:16|32|64)|f32|f64)"
# (opcode, C++, type of the result, types of the operands, of which the last is that of all further ones). C++ of the
# operands $0, $1, ... or all of them $*, with the functions of operations.h. Backslashes: groups of the opcode.
OPERATIONS = [
    (rf"(add|sub|mul)(?:\.rn)?\.{_FLOAT}", r"\1($*)", r"\2", r"\2"),  # both compilers forbid ptxas to fuse them
    (rf"(fma|div|sqrt)\.rn\.{_FLOAT}", r"\1($*)", r"\2", r"\2"),
    (rf"(add|sub|mul|fma|div|sqrt)\.r([zmp])\.{_FLOAT}", r"rounded('\2', [&] { return \1($*); })", r"\3", r"\3"),
    (r"(add|sub|mul|fma)\.rn\.f32x2", r"both([&](int half) { return \1($*); })", "b64", "f32x2"),
    (rf"(min|max|neg|abs)\.{_FLOAT}", r"\1($*)", r"\2", r"\2"),
    (r"abs\.ftz\.f32", "abs_ftz($0)", "f32", "f32"),
    (r"rcp\.approx\.ftz\.f64", "rcp($0)", "f64", "f64"),
    (r"(div|min|max)\.([us](?:16|32|64))", r"\1($*)", r"\2", r"\2"),
    # what does not depend on signs wraps around, as unsigned numbers do
    (r"(add|sub|mul\.lo|neg)\.[us](16|32|64)", r"\1($*)", r"u\2", r"u\2"),
    (r"mad\.lo\.[us](16|32|64)", "mul($0, $1) + $2", r"u\1", r"u\1"),
    (r"mul\.hi\.u32", "(u64)$0 * $1 >> 32", "u32", "u32"),
    (r"mul\.wide\.([us])16", r"mul<\g<1>32>($*)", r"\g<1>32", r"\g<1>16"),
    (r"mul\.wide\.([us])32", r"mul<\g<1>64>($*)", r"\g<1>64", r"\g<1>32"),
    (r"mad\.wide\.([us])32", r"mul<\g<1>64>($0, $1) + $2", r"\g<1>64", r"\g<1>32 \g<1>32 \g<1>64"),
    (r"and\.(pred|b16|b32|b64)", "$0 & $1", r"\1", r"\1"),
    (r"or\.(pred|b16|b32|b64)", "$0 | $1", r"\1", r"\1"),
    (r"xor\.(pred|b16|b32|b64)", "$0 ^ $1", r"\1", r"\1"),
    (r"not\.(b16|b32|b64)", "~$0", r"\1", r"\1"),
    (r"not\.pred", "!$0", "pred", "pred"),
    (rf"(shl|shr)\.{_ANY_INTEGER}", r"\1($*)", r"\2", r"\2 u32"),
    (r"prmt\.b32", "prmt($*)", "b32", "b32"),
    (r"clz\.b32", "$0 ? __builtin_clz($0) : 32", "b32", "b32"),
    (r"bfe\.u(32|64)", "bfe($*)", r"b\1", r"b\1 u32"),
    (r"bfi\.b(32|64)", "bfi($*)", r"b\1", r"b\1 b\1 u32"),
    (r"bfe\.s32", "bfe_s32($*)", "s32", "s32 u32"),
    (rf"setp\.(eq|ne|lt|le|gt|ge)\.{_ALL}", r"is_\1($*)", "pred", r"\2"),
    (rf"setp\.(neu|gtu|geu)\.{_FLOAT}", r"is_\1($*)", "pred", r"\2"),
    (rf"selp\.[busf]{_WIDTH}", "$2 ? $0 : $1", r"b\1", r"b\1 b\1 pred"),
    (r"mov\.pred", "$0", "pred", "pred"),
    (rf"mov\.[busf]{_WIDTH}", "$0", r"b\1", r"b\1"),
    (r"cvta\.to\.global\.u64", "$0", "b64", "b64"),
    (r"cvt\.([us]\d+)\.([us]\d+)", "$0", r"\1", r"\2"),
    (r"cvt\.f64\.f32", "(double)$0", "f64", "f32"),
    (r"cvt\.rn\.f32\.(f64|s32)", "(float)$0", "f32", r"\1"),
    (r"cvt\.rn\.f64\.s64", "(double)$0", "f64", "s64"),
    (r"cvt\.rzi\.f64\.f64", "__builtin_trunc($0)", "f64", "f64"),
    (r"cvt\.rzi\.([us](?:32|64))\.f32", r"to<\1>($0)", r"\1", "f32"),
    (r"cvt\.f32\.(f16|bf16)", r"from_\1($0)", "f32", "b16"),
    (r"cvt\.f64\.(f16|bf16)", r"(double)from_\1($0)", "f64", "b16"),
    (r"cvt\.r([nz])\.(f16|bf16)\.f32", r"to_\2<'\1'>($0)", "b16", "f32"),
    (r"cvt\.r([nz])\.(f16|bf16)x2\.f32", r"(u32)to_\2<'\1'>($0) << 16 | to_\2<'\1'>($1)", "b32", "f32"),
]
_OPERATIONS = [(re.compile(pattern), *row) for pattern, *row in OPERATIONS]
_MEMORY = re.compile(rf"(ld|st|atom)((?:\.(?:global|shared|param|cg|gpu|acq_rel|add|v2|v4))*)\.([bus]|f){_WIDTH}")
_ACCESS = {"ld": "kRead, @", "st": "kWrite, @, stored", "atom": "kAtomic, @"}  # @: the instruction's number
_SPECIAL = {f"%{name}.x": f"T.{name}" for name in ("tid", "ctaid", "ntid", "nctaid")}


def c_type(type_: str) -> str:
    """Of the bits of a value; signed for ``s32``."""
    return "bool" if type_ == "pred" else f"{'' if type_[0] == 's' else 'u'}int{8 * size_of(type_)}_t"


class Emitter:
    """Makes C++ of one instruction; ``at``: its number; ``names``: the translation of its function, which knows
    registers, addresses of shared memory and parameters, and how a thread stops.
    """

    def __init__(self, names, instruction: Instruction, at: int):
        self._names, self._operands, self._at, self._text = names, instruction.operands, at, instruction.text
        self._opcode = instruction.opcode

    def emit(self) -> str:
        """C++ of an instruction other than a branch, a call or a return."""
        if self._opcode.startswith("mov.b") and "{" in "".join(self._operands):
            return self._pack(self._opcode[4:])
        if self._opcode == "bar.sync":
            return self._barrier(self._operands[0])
        if self._opcode in ("bar.red.or.pred", "bar.red.and.pred"):
            meet, got = self._barrier(*self._operands[1:]), self._set(self._operands[0], "pred", "T.value")
            return f"T.any = {int('or' in self._opcode)}; {meet} {got}"
        if self._opcode == "shfl.sync.bfly.b32":
            return self._shuffle()
        if match := _MEMORY.fullmatch(self._opcode):
            kind, modifiers, letter, width = match.groups()
            return self._access(kind, modifiers.split(".")[1:], letter, width)
        for pattern, expression, result, types in _OPERATIONS:
            if match := pattern.fullmatch(self._opcode):
                return self._operation(*(match.expand(part) for part in (expression, result, types)))
        raise UnknownInstruction(self._text)

    def _bits(self, token: str) -> str:
        """The bits of a register or constant, in whatever width it has."""
        if token.startswith("!"):
            return f"!{self._bits(token[1:])}"
        found = _SPECIAL.get(token) or self._names.register(token) or self._names.address(token)
        if found is None and re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", token):
            found = f"0x{token[2:]}u"
        if found is None and re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token):
            found = f"0x{int(token.rstrip('U'), 0) % 2**64:x}u"
        if found is None:
            raise UnknownInstruction(self._text)
        return found

    def _value(self, token: str, type_: str) -> str:
        """A C++ number of the type."""
        if type_ == "f32x2":
            return f"f32({self._bits(token)} >> half)"
        return f"{type_}({self._bits(token)})" if type_[0] == "f" else f"({c_type(type_)})({self._bits(token)})"

    def _set(self, token: str, type_: str, value: str) -> str:
        """Puts the bits of a C++ number of the type into a register, extended by its sign if it has one."""
        if token == "_":
            return ""
        target = self._names.register(token)
        if target is None:
            raise UnknownInstruction(self._text)
        return f"{target} = {f'bits({value})' if type_[0] == 'f' else f'({c_type(type_)})({value})'};"

    def _operation(self, expression: str, result: str, types: str) -> str:
        target, *operands = self._operands
        own = types.split()
        own += own[-1:] * (len(operands) - len(own))
        values = [self._value(*pair) for pair in zip(operands, own, strict=True)]
        put = lambda match: ", ".join(values) if match[1] == "*" else values[int(match[1])]
        return self._set(target, result, re.sub(r"\$(\*|\d)", put, expression.replace(".lo", "")))

    def _pack(self, type_: str) -> str:
        """A number of several registers, or several of a number's parts."""
        target, source = self._operands
        parts = _parts(source if source.startswith("{") else target)
        width = 8 * size_of(type_) // len(parts)
        if target.startswith("{"):
            whole = self._value(source, type_)
            return " ".join(self._set(part, f"b{width}", f"{whole} >> {i * width}") for i, part in enumerate(parts))
        shifted = [f"({c_type(type_)}){self._value(p, f'b{width}')} << {i * width}" for i, p in enumerate(parts)]
        return self._set(target, type_, " | ".join(shifted))

    def _access(self, kind: str, modifiers: list[str], letter: str, width: str) -> str:
        place, values = self._operands[:2] if kind == "st" else self._operands[1::-1]
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", place)
        if match is None:
            raise UnknownInstruction(self._text)
        name, offset, parts = match[1], int(match[2] or 0), _parts(values)
        type_ = c_type(f"{'s' if letter == 's' else 'b'}{width}")
        if "param" in modifiers and name[0] != "%" and self._names.register(name):  # of a call
            target, source = (name, parts[0]) if kind == "st" else (parts[0], name)
            return self._set(target, f"b{width}", self._bits(source))
        at = f"{self._bits(name)} + {offset}"
        if "param" not in modifiers:
            space, access = "shared" if "shared" in modifiers else "global", _ACCESS[kind]
            at = f"T.{space}({at}, {int(width) // 8 * len(parts)}, {access.replace('@', str(self._at))})"
        if kind == "ld":
            each = " ".join(f"{self._names.register(part)} = at[{i}];" for i, part in enumerate(parts) if part != "_")
        elif kind == "st":
            stored = ", ".join(self._value(part, f"b{width}") for part in parts)
            return f"{{ const {type_} stored[] = {{{stored}}}; {at}; }}"
        elif "add" in modifiers and letter == "u":
            added = self._value(self._operands[2], f"u{width}")
            each = f"const {type_} old = *at; *at += {added}; {self._set(parts[0], f'u{width}', 'old')}"
        else:
            raise UnknownInstruction(self._text)
        return f"{{ {type_}* const at = ({type_}*)({at}); {each} }}"

    def _shuffle(self) -> str:
        target, value, *numbers = self._operands
        target, _, found = target.partition("|")  # with | a predicate: whether there is such a lane
        exchange = f"T.exchange({', '.join(self._value(token, 'u32') for token in numbers)}, {self._at});"
        meet, got = self._names.meet("kShuffle", self._bits(value)), self._set(target, "b32", "T.value")
        return f"{exchange} {meet} {got} {self._set(found or '_', 'pred', '1')}"

    def _barrier(self, number: str, value: str = "") -> str:
        if number != "0":
            raise UnknownInstruction(self._text)
        return self._names.meet("kBarrier", self._value(value, "pred") if value else "0")


def _parts(token: str) -> list[str]:
    return [part.strip() for part in token.strip("{} ").split(",")]
