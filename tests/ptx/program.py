"""PTX, parsed: a kernel as a list of instructions."""

import dataclasses
import re

# A word may have dots and double colons (`ld.param::entry.b64`, `%tid.x`); a label's colon is single.
_TOKEN = re.compile(r"[%$\w.]+(?:::[\w.]+)*|-\d+|\S")
_LOCATION = re.compile(r"\.loc\s+(\d+) (\d+)")
_FILE = re.compile(r'\.file\s+(\d+) "([^"]*)"')


class PtxError(Exception):
    """What PTX leaves undefined, what would hang, or what is not emulated."""


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`, or with coordinates a tensor's `[base, {…}]`."""

    base: "Operand"
    offset: int = 0
    coordinates: tuple["Operand", ...] = ()


# A constant's bits, a name (register, label, symbol), a vector or an address.
Operand = int | str | tuple | Address


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name, modifiers: of the opcode, which dots divide.
        operands: as in the text; `a|b` is two.
        predicate: the register that guards it, if one does, and whether it does by being false.
        source: file and line of the code that it was compiled from.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    source: str

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    def __str__(self) -> str:
        return f"{self.opcode} ({self.source})"


@dataclasses.dataclass(frozen=True)
class Program:
    """One entry.

    Attributes:
        instructions: its code.
        labels: index of the instruction after each.
        registers: the type of each, as declared.
        parameters: offset of each among the bytes of all.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]
    parameters: dict[str, int]


def parse(ptx: str) -> Program:
    """The module's entry. Local names of nested blocks become unique by a suffix."""
    files = {number: path.rsplit("/")[-1] for number, path in _FILE.findall(ptx)}
    header, body = ptx[ptx.index(".entry") :].split("{", 1)
    return _Parser(_tokens("{" + body, files)).program(_parameters(header))


def _parameters(header: str) -> dict[str, int]:
    offsets, size = {}, 0
    for kind, name, count in re.findall(r"\.param (\.u64|\.align \d+ \.b8).*?(\w+)(?:\[(\d+)\])?,?\n", header):
        offsets[name], size = size, size + (8 if kind == ".u64" else int(count))
    return offsets


def _tokens(body: str, files: dict[str, str]) -> list[tuple[str, str]]:
    """Each token with the source line it came from."""
    tokens, source = [], "?"
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if found := _LOCATION.match(line):
            source = f"{files.get(found[1], found[1])}:{found[2]}"
        elif not line.startswith((".file", ".section")):
            tokens += [(token, source) for token in _TOKEN.findall(line)]
    return tokens


class _Parser:
    """Recursive descent. `scopes` has the names declared in each open block, with what they are called outside."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.blocks = tokens, 0, 0
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}

    def program(self, parameters: dict[str, int]) -> Program:
        self.block({})
        return Program(self.instructions, self.labels, self.registers, parameters)

    @property
    def next(self) -> str:
        return self.tokens[self.at][0]

    def take(self, expected: str | None = None) -> str:
        token, source = self.tokens[self.at]
        if expected is not None and token != expected:
            raise PtxError(f"{expected!r} expected, not {token!r} ({source})")
        self.at += 1
        return token

    def block(self, names: dict[str, str]) -> None:
        self.take("{")
        suffix = f"@{self.blocks}" if self.blocks else ""
        self.blocks += 1
        names, begin = dict(names), len(self.instructions)
        while self.next != "}":
            if self.next == "{":
                self.block(names)
            elif self.next == ".reg":
                self.declare(names, suffix)
            elif self.next in (".shared", ".pragma"):
                while self.take() != ";":
                    pass
            elif self.tokens[self.at + 1][0] == ":":
                label = self.take()
                names[label] = label + suffix
                self.labels[label + suffix] = len(self.instructions)
                self.take(":")
            else:
                self.instructions.append(self.instruction())
        self.take("}")
        if suffix:
            rename = {name: new for name, new in names.items() if new.endswith(suffix)}
            self.instructions[begin:] = [_renamed(i, rename) for i in self.instructions[begin:]]

    def declare(self, names: dict[str, str], suffix: str) -> None:
        self.take(".reg")
        kind = self.take()
        while True:
            name = self.take()
            if self.next == "<":
                self.take("<")
                declared = [f"{name}{i}" for i in range(int(self.take()))]
                self.take(">")
            else:
                declared = [name]
            for name in declared:
                names[name] = name + suffix
                self.registers[name + suffix] = kind
            if self.take() == ";":
                return

    def instruction(self) -> Instruction:
        predicate, negated = None, False
        if self.next == "@":
            self.take()
            if negated := self.next == "!":
                self.take()
            predicate = self.take()
        source = self.tokens[self.at][1]
        name, *modifiers = self.take().split(".")
        operands = []
        while self.next != ";":
            operands.append(self.operand())
            if self.next in ",|":
                self.take()
        self.take(";")
        return Instruction(name, tuple(modifiers), tuple(operands), predicate, negated, source)

    def operand(self) -> Operand:
        if self.next == "{":
            return self.vector()
        if self.next != "[":
            return self.scalar()
        self.take("[")
        base, offset, coordinates = self.scalar(), 0, ()
        while self.next != "]":
            token = self.take()
            if token == ",":
                coordinates = self.vector()
            else:
                offset = int(self.take()) if token == "+" else int(token)
        self.take("]")
        return Address(base, offset, coordinates)

    def vector(self) -> tuple[Operand, ...]:
        self.take("{")
        parts = []
        while self.next != "}":
            parts.append(self.scalar())
            if self.next == ",":
                self.take()
        self.take("}")
        return tuple(parts)

    def scalar(self) -> int | str:
        token = self.take()
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", token):
            return int(token[2:], 16)
        return int(token, 0) if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", token) else token


def _renamed(instruction: Instruction, names: dict[str, str]) -> Instruction:
    def of(operand: Operand) -> Operand:
        if isinstance(operand, str):
            return names.get(operand, operand)
        if isinstance(operand, tuple):
            return tuple(map(of, operand))
        if isinstance(operand, Address):
            return Address(of(operand.base), operand.offset, of(operand.coordinates))
        return operand

    predicate = instruction.predicate and of(instruction.predicate)
    return dataclasses.replace(instruction, operands=of(instruction.operands), predicate=predicate)
