"""Which rank is gone, when a collective fails because a peer's connection broke.

A survivor only learns that some connection was reset. So every rank that fails this way answers a roll call in the
rendezvous store and waits a moment for the others: who does not answer is dead, or still waits for one that is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist

from dlm_scale.parallel.dist_env import DistEnv

WAIT_SECONDS = 2.0
BROKEN = ("by peer", "broken pipe", "connection refused", "remote process exited", "nccl")


@contextlib.contextmanager
def naming_lost_ranks(env: DistEnv, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Re-raise the error of a broken connection as one RuntimeError that names the ranks that do not answer."""
    try:
        yield
    except RuntimeError as error:
        if env.world_size == 1 or not any(words in str(error).lower() for words in BROKEN):
            raise
        missing = ranks_without_answer(env, seconds)
        first = str(error).splitlines()[0]
        raise RuntimeError(f"rank {env.rank} of {env.world_size} stops: no answer from ranks {missing}, which died or "
                           f"wait for one that did; look at their logs first ({first})") from error


def ranks_without_answer(env: DistEnv, seconds: float) -> list[int]:
    """Answer the roll call; the ranks that have not after `seconds`. Rank 0, where its store does not answer."""
    missing, deadline = [], time.monotonic() + seconds
    others = [rank for rank in range(env.world_size) if rank != env.rank]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"roll_call/{env.rank}", "here")
        while time.monotonic() < deadline:
            missing = [rank for rank in others if not store.check([f"roll_call/{rank}"])]
            if not missing:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store's host is gone: from the start, or when it had heard enough
        return missing or [0]
    return missing
