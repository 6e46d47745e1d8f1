"""Run a function on several gloo ranks: forked children, one time limit, nothing may hang or outlive the test."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

TIME_LIMIT_SECONDS = 110.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size: int, function: Callable, *args: Any, seconds: float = TIME_LIMIT_SECONDS) -> list[Any]:
    """`function(*args)` on every rank, with a launcher's environment; the ranks' results in rank order.

    The parent must not have run a multi-threaded matmul before (fork would deadlock the child): the child sets one
    thread first thing, which also covers a parent that did. Raises with the child's traceback when one fails.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes, children = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(sender, rank, world_size, port, function, args), daemon=True)
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    try:
        return _collect(pipes, children, time.monotonic() + seconds)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()


def _collect(pipes: list, children: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = multiprocessing.connection.wait([pipes[r] for r in range(len(pipes)) if r not in results],
                                                max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} gave no result in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                error = f"it died with exit code {children[rank].join(5) or children[rank].exitcode}"
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _child(sender, rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1",
                      LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        sender.send((None, function(*args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        sender.close()
        os._exit(0)  # no atexit handlers of the parent's imports
