"""Runs compiled PTX of Triton kernels on a CPU, and rejects what a GPU would silently get wrong.

    ptx         text to instructions
    decode      instructions to steps: integers, floats, moves, control, transfers, matrix
    machine     blocks side by side, their branches, barriers and asynchronous work
    memory      global and shared memory, and who touched what
    traffic     counts of what is moved
    launch      stand-ins for Triton kernels
    plugin      pytest on stand-ins; snippets and mutants are for the emulator's own tests

docs/emulation.md says what is looked for, and what cannot be seen.
"""
