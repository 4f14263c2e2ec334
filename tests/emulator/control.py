"""Branches, barriers and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Decoder, Step, step, unknown
from .errors import DivergenceError, EmulationError
from .machine import EXIT
from .ptx import Instruction

if TYPE_CHECKING:
    from .machine import Group


@step("bra")
def _branch(decoder: Decoder, instruction: Instruction) -> Step:
    program, label = decoder.program, instruction.operands[0]
    if label not in program.labels:
        raise unknown(instruction, "no such label")
    target, guard = program.labels[label], decoder.guard(instruction)
    pc = decoder.place
    if guard is None:
        return lambda group: target

    def branch(group: Group) -> int | None:
        mask = guard(group.registers)
        if mask.size == 1:
            return target if mask.item() else None
        taken = group.uniform(mask, "a branch")
        return group.machine.fork(group, taken, target, pc)

    return branch


@step("ret", "exit")
def _return(decoder: Decoder, instruction: Instruction) -> Step:
    pc = decoder.place
    guard = decoder.guard(instruction)
    if guard is None:
        return lambda group: EXIT

    def leave(group: Group) -> int | None:
        taken = group.uniform(guard(group.registers), "an exit")
        if taken.any() and not taken.all():
            group.machine.waiting.append(group.split(~taken, pc + 1))
        return EXIT if taken.any() else None

    return leave


@step("trap")
def _trap(decoder: Decoder, instruction: Instruction) -> Step:
    guard = decoder.guard(instruction)

    def trap(group: Group) -> None:
        if guard is None or guard(group.registers).any():
            raise EmulationError("the program gave up here")

    return trap


@step("bar", "barrier")
def _barrier(decoder: Decoder, instruction: Instruction) -> Step:
    words = [word for word in instruction.parts[1:] if word not in ("cta", "aligned")]
    if words == ["warp", "sync"]:
        # lanes of a warp are always in step here
        return lambda group: None
    operands = instruction.operands
    threads = decoder.program.threads
    if words != ["sync"] or operands[0] != "0" or operands[1:] not in ((), (str(threads),)):
        raise unknown(instruction, "a barrier of some threads only")
    guard = decoder.guard(instruction)

    def barrier(group: Group) -> None:
        if guard is not None:
            arrived = group.whole(guard(group.registers))
            if not arrived.all(axis=1).all():
                raise DivergenceError("a barrier that some threads of a block do not reach")
        group.barrier()

    return barrier


@step("fence", "membar")
def _fence(decoder: Decoder, instruction: Instruction) -> Step:
    """Ordinary writes to shared memory become visible to asynchronous products."""
    if "proxy" not in instruction.parts:
        return lambda group: None
    if instruction.parts[:3] != ["fence", "proxy", "async"]:
        raise unknown(instruction)
    return lambda group: group.machine.shared.fence(group.rows)


@step("griddepcontrol", "nop")
def _nothing(decoder: Decoder, instruction: Instruction) -> Step:
    return lambda group: None


@step("createpolicy")
def _policy(decoder: Decoder, instruction: Instruction) -> Step:
    """How long a line stays in cache: a handle that changes no value."""
    zero = np.zeros((1, 1), np.uint64)
    return decoder.assign(instruction, instruction.operands[0], lambda r: zero)
