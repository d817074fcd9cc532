"""PTX text -> functions, their instructions and their memory, without knowing what an instruction means."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^[ \t]*\.(?:loc|file)\b[^\n]*", re.DOTALL | re.MULTILINE)
_FUNCTION = re.compile(r"\.(entry|func)\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*\(([^)]*)\)[^{;]*([{;])")
_SHARED = re.compile(r"^\s*(?:\.\w+\s+)?(\.shared\b[^;{]*);", re.MULTILINE)
_VARIABLE = re.compile(r"\.(?:param|shared)((?:\s+\.\w+(?:\s+\d+)?)+)\s+([\w$]+)(?:\[(\d*)\])?")
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_DECLARATION = re.compile(r"\s*\.(?:reg|param)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(.*)", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:@(!?%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)")


class Variable(NamedTuple):
    """A parameter, or a piece of shared memory; ``size``: bytes."""

    name: str
    type: str
    size: int
    alignment: int


class Instruction(NamedTuple):
    """``guard``: a predicate register, with a ! before it if it must be false, or nothing."""

    guard: str
    opcode: str
    operands: tuple[str, ...]
    text: str


@dataclass
class Function:
    """``registers``: the type of each; ``body``: instructions, and labels as plain strings."""

    name: str
    parameters: list[Variable]
    returned: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    body: list[Instruction | str] = field(default_factory=list)


class Module:
    """A PTX text. A function is read when it is asked for."""

    def __init__(self, text: str):
        self._text = _COMMENT.sub("", text)
        found = [match for match in _FUNCTION.finditer(self._text) if match[5] == "{"]
        self._found = {match[3]: match for match in found}
        self.entries = [match[3] for match in found if match[1] == "entry"]
        self.shared = [_variable(match[1]) for match in _SHARED.finditer(self._text)]

    def function(self, name: str) -> Function:
        match = self._found[name]
        function = Function(name, _variables(match[4]), _variables(match[2] or ""))
        _read_body(function, self._text, match.end())
        return function


def size_of(type_: str) -> int:
    """Bytes of a type: ``b32``, ``f64``, ``pred``."""
    return 1 if type_ == "pred" else int(type_[1:]) // 8


def _variables(text: str) -> list[Variable]:
    return [_variable(each) for each in text.split(",") if each.strip()]


def _variable(text: str) -> Variable:
    attributes, name, count = _VARIABLE.search(text).groups()
    words = attributes.split()
    type_ = next(word[1:] for word in words if re.fullmatch(r"\.[busf]\d+", word))
    size = size_of(type_)
    # after .ptr stands the alignment of what a pointer points to
    alignment = words[words.index(".align") + 1] if ".align" in words and ".ptr" not in words else size
    return Variable(name, type_, size if count is None else size * int(count or 0), int(alignment))


def _read_body(function: Function, text: str, place: int) -> None:
    """Reads up to the brace that closes the function.

    A name that is declared inside of inner braces is another one in each of them, and is renamed.
    """
    scopes: list[dict[str, str]] = [{}]
    rename = lambda match: next((scope[match[0]] for scope in reversed(scopes) if match[0] in scope), match[0])
    while scopes:
        match = _STATEMENT.match(text, place)
        if match is None:
            raise ValueError(f"{function.name}: cannot be read: {text[place : place + 80]!r}")
        brace, label, statement = match.groups()
        place = match.end()
        if brace == "{":
            scopes.append({})
        elif brace == "}":
            scopes.pop()
        elif label:
            function.body.append(label)
        elif declared := _DECLARATION.match(statement):
            for name in declared[2].split(","):
                _declare(function, declared[1], name.strip(), scopes)
        elif statement.strip() and not statement.lstrip().startswith(".pragma"):
            function.body.append(_instruction(" ".join(statement.split()), rename))


def _declare(function: Function, type_: str, name: str, scopes: list[dict[str, str]]) -> None:
    many = re.fullmatch(r"(%\w+)<(\d+)>", name)
    for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
        own = each
        if len(scopes) > 1:
            scopes[-1][each] = own = f"{each}_{len(function.registers)}"
        function.registers[own] = type_


def _instruction(text: str, rename: Callable[[re.Match[str]], str]) -> Instruction:
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise ValueError(f"not an instruction: {text!r}")
    guard, opcode, rest = (re.sub(r"(?<![\w.%])[%\w$]+", rename, part or "") for part in match.groups())
    operands, depth, begin = [], 0, 0
    for place, letter in enumerate(rest + ","):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            operands.append(rest[begin:place].strip())
            begin = place + 1
    return Instruction(guard, opcode, tuple(filter(None, operands)), text)
