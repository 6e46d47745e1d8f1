"""What a disk may hold after a power loss, from a log of file operations.

POSIX promises little: the content of a file up to its last fsync, the names in a folder up to the folder's last fsync;
of what came later any part may be there or not. Five worlds are drawn from that: nothing of it, names without content,
content without names, a prefix of the operations on names, and any mixture, down to single blocks of a file.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HEAD = struct.Struct("@cIllll")  # struct event of shim.c
BLOCK = 512
WORLDS = ("nothing", "names", "content", "prefix", "mixture")


class Event(NamedTuple):
    what: str  # o create or empty, w write, t truncate, s fsync, r rename, u remove, m make folder, ! a mark
    ino: int
    offset: int
    path: str
    other: str
    data: bytes


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass
class Folder:
    """`pending`: (name removed or None, name added or None, node) since the last fsync."""

    names: dict = field(default_factory=dict)
    durable: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)

    def change(self, removed: str | None, added: str | None, node: File | Folder | None) -> None:
        apply_change(self.names, (removed, added, node))
        self.pending.append((removed, added, node))


def apply_change(names: dict, change: tuple) -> None:
    removed, added, node = change
    names.pop(removed, None)
    if added is not None:
        names[added] = node


def read_log(path: Path) -> Iterator[Event]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        what, ino, offset, *sizes = HEAD.unpack_from(data, at)
        at += HEAD.size
        parts = []
        for size in sizes:
            parts.append(data[at:at + size])
            at += size
        yield Event(what.decode(), ino, offset, parts[0].decode(), parts[1].decode(), parts[2])


class Disk:
    """The model: an empty, durable folder `root`, changed event by event."""

    def __init__(self, root: Path):
        self.root, self.top, self.by_ino = Path(root), Folder(), {}

    def apply(self, event: Event) -> None:
        {"o": self._create, "m": self._make, "w": self._write, "t": self._truncate, "s": self._sync,
         "r": self._rename, "u": self._remove}[event.what](event)

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self.root).parts
        folder = self.top
        for part in parents:
            folder = folder.names[part]
        return folder, name

    def _create(self, event: Event) -> None:
        folder, name = self._place(event.path)
        if name in folder.names:
            del folder.names[name].data[:]
        else:
            self.by_ino[event.ino] = File()
            folder.change(None, name, self.by_ino[event.ino])

    def _make(self, event: Event) -> None:
        folder, name = self._place(event.path)
        self.by_ino[event.ino] = Folder()
        folder.change(None, name, self.by_ino[event.ino])

    def _write(self, event: Event) -> None:
        data = self.by_ino[event.ino].data
        data.extend(bytes(max(0, event.offset - len(data))))
        data[event.offset:event.offset + len(event.data)] = event.data

    def _truncate(self, event: Event) -> None:
        data = self.by_ino[event.ino].data
        del data[event.offset:]
        data.extend(bytes(event.offset - len(data)))

    def _sync(self, event: Event) -> None:
        node = self.top if Path(event.path) == self.root else self.by_ino[event.ino]
        if isinstance(node, File):
            node.durable = bytes(node.data)
        else:
            node.durable, node.pending = dict(node.names), []

    def _rename(self, event: Event) -> None:
        (folder, name), (target, new) = self._place(event.path), self._place(event.other)
        node = folder.names[name]
        if folder is target:
            folder.change(name, new, node)
        else:
            folder.change(name, None, None)
            target.change(None, new, node)

    def _remove(self, event: Event) -> None:
        folder, name = self._place(event.path)
        folder.change(name, None, None)

    def write_out(self, target: Path, world: str, rng: random.Random) -> None:
        """Make in the empty folder `target` what the disk may hold; the world `everything` is what it holds now."""
        self._write_folder(self.top, target, world, rng)

    def _write_folder(self, folder: Folder, target: Path, world: str, rng: random.Random) -> None:
        for name, node in surviving_names(folder, world, rng).items():
            if isinstance(node, Folder):
                (target / name).mkdir()
                self._write_folder(node, target / name, world, rng)
            else:
                (target / name).write_bytes(surviving_content(node, world, rng))


def surviving_names(folder: Folder, world: str, rng: random.Random) -> dict:
    if world in ("names", "everything"):
        return folder.names
    names, changes = dict(folder.durable), folder.pending
    if world == "prefix":
        changes = changes[:rng.randint(0, len(changes))]
    elif world == "mixture":
        changes = [change for change in changes if rng.random() < 0.5]
    else:
        changes = []
    for change in changes:
        apply_change(names, change)
    return names


def surviving_content(node: File, world: str, rng: random.Random) -> bytes:
    if world in ("content", "everything"):
        return bytes(node.data)
    if world != "mixture":
        return node.durable
    size = rng.choice((len(node.data), len(node.durable)))
    old, new = (bytes(data[:size]).ljust(size, b"\0") for data in (node.durable, node.data))
    return b"".join(rng.choice((old, new))[at:at + BLOCK] for at in range(0, size, BLOCK))
