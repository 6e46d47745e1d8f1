"""Batches made ahead: in sequence, a few at a time, errors in their turn, no thread left behind."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from dlm_scale.engine.prefetch import DEPTH, Prefetcher
from dlm_scale.engine.state import TrainState


def settled(calls: list) -> int:
    """How many calls there are once no more come."""
    before = -1
    while before != len(calls):
        before = len(calls)
        time.sleep(0.05)
    return before


def test_batches_come_in_sequence_and_at_most_so_many_ahead():
    calls, threads = [], set()

    def make(state: TrainState) -> TrainState:
        calls.append(state)
        threads.add(threading.current_thread())
        return state

    state = TrainState(3, 24)
    with Prefetcher(make, state, 12, 8, lambda: threads.add(threading.current_thread())) as batches:
        assert settled(calls) == DEPTH and batches.peek() == state
        for step in range(3, 12):
            assert batches.next() == TrainState(step, 8 * step)
            assert settled(calls) == min(9, step - 2 + DEPTH)  # none beyond the last step
    assert len(threads) == 1 and threading.current_thread() not in threads and not threads.pop().is_alive()


def test_the_first_batch_is_made_where_nothing_is_left_to_do():
    with Prefetcher(lambda state: state.step, TrainState(5, 40), 5, 8) as batches:
        assert batches.peek() == 5


def test_an_error_comes_in_its_turn_with_its_traceback():
    def make_of_disk(state: TrainState) -> int:
        if state.step == 2:
            raise OSError("disk gone")
        return state.step

    with pytest.raises(OSError, match="disk gone") as caught, Prefetcher(make_of_disk, TrainState(), 9, 1) as batches:
        assert [batches.next(), batches.next()] == [0, 1]
        batches.next()
    assert "make_of_disk" in "".join(traceback.format_tb(caught.tb))


def test_leaving_cancels_what_has_not_begun():
    calls, go = [], threading.Event()

    def make(state: TrainState) -> None:
        calls.append(state)
        go.wait(10)

    with pytest.raises(KeyboardInterrupt), Prefetcher(make, TrainState(), 99, 1):
        while not calls:
            time.sleep(0.001)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert len(calls) == 1


def test_time_spent_waiting_is_counted():
    with Prefetcher(lambda state: time.sleep(0.05), TrainState(), 3, 1) as batches:
        batches.next()
        assert 0.03 < batches.waited_seconds < 1.0
        time.sleep(0.2)
        waited = batches.waited_seconds
        batches.next()
        assert batches.waited_seconds - waited < 0.03
