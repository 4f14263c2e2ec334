"""PTX as text to instructions: names, operands, labels and the widths of registers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from .errors import EmulationError


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all of its modifiers, as in ``ld.global.v4.b32``.
        operands: as written; braces and brackets keep their commas.
        predicate: the register that guards it, or None.
        negated: it runs where the predicate is false.
        line: in the text of the program, from 1 on.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    line: int = 0

    @cached_property
    def parts(self) -> list[str]:
        """The opcode's words."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        operands = ", ".join(self.operands)
        return f"{guard}{self.opcode} {operands if len(operands) < 90 else operands[:87] + '...'}"


@dataclass
class Program:
    """One kernel.

    Attributes:
        name: of the entry.
        parameters: names and bits, in their order.
        threads: of a block.
        registers: type by name, or by the name without its number.
        instructions: in the order of the text.
        labels: index of the instruction that follows each.
    """

    name: str
    parameters: list[tuple[str, int]]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    _widths: dict[str, int] = field(default_factory=dict, repr=False)

    def width(self, register: str) -> int:
        """Bits of a register, 1 of a predicate."""
        if found := self._widths.get(register):
            return found
        kind = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if kind is None:
            raise EmulationError(f"no register is called {register!r}")
        self._widths[register] = width = 1 if kind == "pred" else int(kind.lstrip("bfsu"))
        return width


_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


def split_operands(text: str) -> tuple[str, ...]:
    """Operands, split at the commas outside of braces and brackets."""
    return tuple(part.strip() for part in _OPERAND.findall(text) if part.strip())


def members(operand: str) -> list[str]:
    """The registers of a vector operand ``{a, b}``, or the one of a plain operand."""
    return [word.strip() for word in operand.strip("{} \t\n").split(",")]


_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\S+?)\((.*?)\)(.*?)\n\{", re.S)
_LABEL = re.compile(r"([$\w]+):(?!:)\s*")
_GUARDED = re.compile(r"(?:@(!?)(%?\w+)\s+)?(\S+)\s*(.*)", re.S)


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    # where a line of Python began
    return re.sub(r"(?m)^\s*\.(loc|file|section)\b[^\n]*$", "", text)


def _declare(program: Program, kind: str, names: str) -> None:
    for item in names.split(","):
        name = item.strip()
        numbered = re.match(r"(%?\w+)<\d+>", name)
        program.registers[numbered[1] if numbered else name] = kind


# most statements stand in other variants of a kernel, too
@lru_cache(maxsize=2**17)
def _read(text: str) -> tuple[str, tuple[str, ...], str | None, bool]:
    """The fields of an instruction but its line."""
    found = _GUARDED.match(text)
    assert found is not None
    return found[3], split_operands(found[4]), found[2], found[1] == "!"


def _statement(program: Program, text: str, line: int) -> None:
    """Adds what stands before one semicolon."""
    while True:
        text = text.strip()
        if label := _LABEL.match(text):
            program.labels[label[1]] = len(program.instructions)
            text = text[label.end() :]
        elif text.startswith(("{", "}")):
            # a scope of registers, as inline assembly opens
            text = text[1:]
        else:
            break
    if not text or text.startswith(".pragma"):
        return
    if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
        _declare(program, declared[1], declared[2])
        return
    if text.startswith("."):
        raise EmulationError(f"line {line}: unknown directive {text[:60]!r}")
    program.instructions.append(Instruction(*_read(text), line))


def parse(text: str) -> Program:
    """The kernel in a PTX module.

    Raises:
        EmulationError: there is no entry, or a directive in it is unknown.
    """
    text = _without_comments(text)
    entry = _ENTRY.search(text)
    if entry is None:
        raise EmulationError("no .visible .entry in this PTX")
    parameters = []
    for item in entry[2].split(","):
        if words := item.split():
            parameters.append((words[-1], int(words[1].lstrip(".bfsu"))))
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    if threads is None:
        raise EmulationError(f"{entry[1]} does not say how many threads it has")
    program = Program(entry[1], parameters, int(threads[1]))
    stop = text.index("\n}", entry.end())
    line = text.count("\n", 0, entry.end()) + 1
    for statement in text[entry.end() : stop].split(";"):
        lead = len(statement) - len(statement.lstrip())
        _statement(program, statement, line + statement.count("\n", 0, lead))
        line += statement.count("\n")
    return program
