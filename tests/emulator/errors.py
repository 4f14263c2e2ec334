"""What the emulator refuses, one class per kind of mistake."""


class EmulationError(RuntimeError):
    """Compiled code did something wrong, or something the emulator does not know."""


class UnknownInstructionError(EmulationError):
    """An instruction, or a form of one, that has no meaning here; the message names it."""


class OutOfBoundsError(EmulationError):
    """An access outside of every tensor, or of the program's shared memory."""


class MisalignedError(EmulationError):
    """An address that is no multiple of the bytes accessed there."""


class UninitializedError(EmulationError):
    """Shared memory or a register was read before anything was written to it."""


class UnfinishedError(EmulationError):
    """What an asynchronous copy or product still writes or reads was touched before its wait."""


class RaceError(EmulationError):
    """Two warps touch the same memory, one of them writes, and no barrier lies between."""


class ConflictError(EmulationError):
    """Lanes of one instruction write different values to one address."""


class SerializedWarning(UserWarning):
    """PTX that ptxas makes right at the price of speed, with its remark C7515."""


class DivergenceError(EmulationError):
    """Threads of a block part ways: a barrier behind the branch would be reached by some only."""
