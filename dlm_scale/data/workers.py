"""A pool of processes that says when one of them died, and whose processes end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from dlm_scale.errors import UsageError

Task = tuple[Callable[..., Any], tuple]  # a function of a module, and its arguments


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: Iterator[tuple[int, Task]], num_workers: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of each numbered task, as they end; a task is taken from the iterator when a worker is free.

    One task, or one worker, needs no process: it runs here. An exception in a task is raised here; a worker that
    dies is a RuntimeError.
    """
    first = next(tasks, None)
    second = next(tasks, None) if num_workers > 1 else None
    rest = (task for some in ((first, second), tasks) for task in some if task is not None)
    if second is None:
        yield from ((number, function(*arguments)) for number, (function, arguments) in rest)
        return
    workers: list[_Worker] = []
    try:
        yield from _in_processes(rest, num_workers, workers)
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _in_processes(
    tasks: Iterator[tuple[int, Task]], num_workers: int, workers: list[_Worker]
) -> Iterator[tuple[int, Any]]:
    busy: dict[Connection, tuple[_Worker, int]] = {}
    idle: list[_Worker] = []
    for number, task in tasks:
        if not idle and len(workers) < num_workers:
            workers.append(_start())
            idle.append(workers[-1])
        while not idle:
            yield from _results(busy, idle)
        worker = idle.pop()
        try:
            worker.pipe.send(task)
        except ConnectionError:
            raise _death_of(worker) from None
        busy[worker.pipe] = worker, number
    while busy:
        yield from _results(busy, idle)


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")  # not fork: libraries of the parent may have started threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _results(busy: dict[Connection, tuple[_Worker, int]], idle: list[_Worker]) -> Iterator[tuple[int, Any]]:
    for pipe in wait(list(busy)):
        worker, number = busy.pop(pipe)
        try:
            result = pipe.recv()
        except (EOFError, ConnectionError):
            raise _death_of(worker) from None
        if isinstance(result, Exception):
            raise result
        idle.append(worker)
        yield number, result


def _death_of(worker: _Worker) -> RuntimeError:
    worker.process.join()
    code = worker.process.exitcode
    cause = f"signal {signal.Signals(-code).name} (out of memory?)" if code < 0 else f"exit code {code}"
    return RuntimeError(f"a worker process ended with {cause}; the same command continues")


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            function, arguments = pipe.recv()
            pipe.send(_result(function, arguments))


def _result(function: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return function(*arguments)
    except UsageError as error:
        return UsageError(str(error))
    except Exception:
        return RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def end_if_orphaned() -> None:
    """In a worker whose parent is gone: end."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
