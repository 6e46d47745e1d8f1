"""Simulated ranks (threads of one process) and random layouts of random tensors, for the checkpoint tests."""
import os
import random
import threading
from math import prod
from types import SimpleNamespace

import pytest
import torch

from dlm_scale.checkpoint.layout import Piece
from dlm_scale.checkpoint.writer import write_checkpoint

torch.set_num_threads(1)


class World:
    """`gather` for threads: everyone leaves with everyone's value."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=20)

    def gather(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def run(self, work):
        """work(rank, gather) on every rank; returns (results, errors)."""
        results, errors = [None] * self.size, [None] * self.size

        def body(rank):
            try:
                results[rank] = work(rank, lambda value: self.gather(rank, value))
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results, errors


def save(root, step, pieces_by_rank, documents=None, keep_last=10, keep_every=0):
    """Save from simulated ranks; returns (paths, errors) by rank."""
    size = len(pieces_by_rank)
    documents = {"state.json": b'{"step":%d}' % step} if documents is None else documents
    return World(size).run(lambda rank, gather: write_checkpoint(
        root, step, iter(pieces_by_rank[rank]), rank=rank, world_size=size, gather=gather, documents=documents,
        keep_last=keep_last, keep_every=keep_every))


def cuts(rng, total, parts):
    """`parts` consecutive ranges of [0, total), some of them possibly empty."""
    ends = [0, *sorted(rng.randint(0, total) for _ in range(parts - 1)), total]
    return list(zip(ends, ends[1:]))


def random_view(rng, shape):
    """A view that splits the first dimension, as fused gate and up weights need, or the shape itself."""
    if shape and shape[0] % 2 == 0 and rng.random() < 0.4:
        return (2, shape[0] // 2, *shape[1:])
    return tuple(shape)


def random_tensors(seed, count=6):
    """(name, slot) -> (values, view)."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bool]
    tensors = {}
    for index in range(count):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        if rng.random() < 0.4 and shape:
            shape = (2 * shape[0], *shape[1:])
        for slot in rng.sample(["param", "exp_avg", "ema"], rng.randint(1, 2)):
            values = torch.randn(shape, generator=generator) * 10
            tensors[f"block.{index}.weight", slot] = (values.to(rng.choice(dtypes)), random_view(rng, shape))
    return tensors


def random_layout(tensors, tensor_parallel, data_parallel, seed):
    """Pieces by rank: boxes over the tensor-parallel ranks, ragged flat parts or replicas over the data-parallel."""
    rng = random.Random(seed)
    by_rank = [[] for _ in range(tensor_parallel * data_parallel)]
    for (name, slot), (values, view) in tensors.items():
        whole, dim = tuple((0, size) for size in view), rng.randrange(len(view)) if view else 0
        is_split, is_replicated = bool(view) and rng.random() < 0.8, rng.random() < 0.3
        boxes = [(*whole[:dim], ends, *whole[dim + 1:]) for ends in cuts(rng, view[dim], tensor_parallel)
                 ] if is_split else [whole] * tensor_parallel
        parts = {box: cuts(rng, prod(stop - start for start, stop in box), data_parallel) for box in boxes}
        for tp, box in enumerate(boxes):
            flat = cut(values, view, box)
            for dp in range(data_parallel if flat.numel() else 0):
                start, stop = (0, flat.numel()) if is_replicated else parts[box][dp]
                by_rank[dp * tensor_parallel + tp].append(
                    Piece(name, slot, tuple(values.shape), view, box, start, flat[start:stop]))
    return by_rank


def cut(values, view, box):
    """The oracle: the flattened box by plain indexing."""
    return values.reshape(view)[tuple(slice(*ends) for ends in box)].reshape(-1)


def random_box(rng, view):
    ends = [sorted(rng.sample(range(size + 1), 2)) for size in view]
    return tuple((start, stop) for start, stop in ends)


def small_checkpoint(root, step=1, seed=0, world=2):
    """A checkpoint of a few kilobytes written by `world` ranks; returns its folder."""
    paths, errors = save(root, step, random_layout(random_tensors(seed, 2), 1, world, seed))
    assert errors == [None] * world
    return paths[0]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What is fsynced, and when, has a test of its own; the others need not wait for it."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def sim():
    return SimpleNamespace(World=World, save=save, cuts=cuts, random_tensors=random_tensors, cut=cut, prod=prod,
                           random_layout=random_layout, random_box=random_box, small_checkpoint=small_checkpoint)
