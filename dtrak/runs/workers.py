"""Working through a list of models in this process, or in several at once."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from .ranks import ranks

# (name of the model, units of work done, units) as work goes on
Report = Callable[[str, int, int], None]
# one model: (name, progress) -> whether this call finished it
Job = Callable[[str, Callable[[int, int], None]], bool]

# of the name of a model, which a list of models holds in memory
NAME_BYTES = 100
_POLL_SECONDS = 0.5


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread: layers as small as the digits' gain little from a second one.

    On a busy machine its threads wait for each other at every layer, and training takes ten times
    as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work(
    make_job: Callable[[int], Job], names: Sequence[str], processes: int, report: Report
) -> int:
    """Call a job for every name, in order; several processes divide them by claiming.

    Args:
        make_job: called with the number of the worker, in the process that does the work; it and
            its arguments must be picklable where there is more than one process.
        names: of the models.
        processes: how many work at once; no more than there are models.
        report: called in this process as work goes on, and with (name, units, units) at its end.

    Returns:
        How many models were finished by this call.

    Raises:
        ValueError: ``processes`` is below 1, or a job refused its model.
        RuntimeError: a process died.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    processes = min(processes, len(names))
    if processes <= 1:
        with one_thread():
            return _work_through(make_job(0), names, report)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    workers = [
        context.Process(target=_worker, args=(make_job, number, names, messages), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        return _listen(workers, messages, report)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def work_together(
    make_job: Callable[[int], Job],
    names: Sequence[str],
    processes: int,
    report: Report,
    claim: Callable[[str, bool], AbstractContextManager[bool]],
    is_done: Callable[[str], bool],
) -> int:
    """`work`, by all processes that were launched together; by this one where it is alone.

    Each begins with names of its own, goes on with what nobody is at, and waits for the others.

    Args:
        make_job: as there; a job claims what it works on.
        names: as there, the same in every process.
        processes: as there, in each.
        report: as there; of a model that another process finished with 0 units.
        claim: of a name, as its job claims it, waiting or not.
        is_done: whether a model is finished.

    Raises:
        ValueError, RuntimeError: as `work`.
    """
    here, told = ranks(), set[str]()

    def tell_of_others() -> None:
        for other in names if here.is_launched else ():
            if other not in told and is_done(other):
                told.add(other)
                report(other, 0, 0)

    def reported(name: str, done: int, units: int) -> None:
        told.add(name)
        report(name, done, units)
        if done == units:
            tell_of_others()

    own = names[here.rank :: here.world] if here.is_launched else names
    left = [*own, *(name for name in names if name not in set(own))]
    finished = work(make_job, left, processes, reported)
    while here.is_launched and (left := [name for name in names if not is_done(name)]):
        # another process is at these: wait until it has ended, however it ends
        with claim(left[0], True):
            pass
        finished += work(make_job, left, processes, reported)
    tell_of_others()
    return finished


def _work_through(job: Job, names: Sequence[str], report: Report) -> int:
    return sum(job(name, partial(report, name)) for name in names)


def _worker(
    make_job: Callable[[int], Job], number: int, names: Sequence[str], messages: Any
) -> None:
    # Ctrl-C reaches the whole group: the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def report(name: str, done: int, total: int) -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit(1)
        messages.put(("progress", (name, done, total)))

    try:
        with one_thread():
            messages.put(("end", _work_through(make_job(number), names, report)))
    except (OSError, ValueError, RuntimeError) as error:
        messages.put(("error", " ".join(str(error).split())))


def _listen(workers: Sequence[Any], messages: Any, report: Report) -> int:
    running, finished = len(workers), 0
    while running:
        try:
            kind, content = messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise RuntimeError(f"a worker died with exit code {dead[0]}") from None
            continue
        if kind == "progress":
            report(*content)
        elif kind == "error":
            raise ValueError(content)
        else:
            running -= 1
            finished += content
    return finished
