"""Files of torch.save, read without executing them.

Such a file is a zip of raw storages and of a pickle that puts tensors together from them. A pickle is a program that
may call anything; here its instructions are listed by the standard library's disassembler and followed by a small
machine that knows data, and a fixed list of names with a meaning of our own for each. It has no means to import or to
call anything else: whatever is not on the list ends the reading. Tensors stay on disk as `Stored`.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_scale.checkpoint.files import open_regular, read_at
from dlm_scale.checkpoint.layout import DTYPES
from dlm_scale.convert.stores import Run, Stored
from dlm_scale.errors import UsageError

MAX_PICKLE_BYTES = 512 << 20
LOCAL_HEADER_BYTES = 30
STORAGES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
            "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """Raw data of a file: `numel` elements of a dtype from byte `offset`."""

    path: Path
    dtype: str
    offset: int
    numel: int


class Inert:
    """Stands for an object of which nothing is needed."""


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *ignored: Any) -> Stored:
    """A contiguous tensor over a storage."""
    numbers = [offset, *shape, *stride]
    is_sound = len(numbers) < 64 and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    if not isinstance(storage, Storage) or not is_sound:
        raise ValueError("a tensor of no known form")
    numel = math.prod(shape)
    row_major = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if numel and any(size > 1 and step != want for size, step, want in zip(shape, stride, row_major, strict=True)):
        raise ValueError(f"a tensor of shape {tuple(shape)} that is not contiguous")
    if offset + numel > storage.numel:
        raise ValueError(f"a tensor of shape {tuple(shape)} that leaves its storage")
    item_size = DTYPES[storage.dtype][1]
    return Stored(storage.dtype, tuple(shape), (Run(storage.path, storage.offset + offset * item_size, numel),))


def _inert(*ignored: Any) -> Inert:
    return Inert()


# What a name means here: a function of the machine's own values. Nothing is imported under any of these names.
NAMES: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda pairs=(): dict(pairs),
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch Tensor": _inert,
    "torch.nn.parameter Parameter": _inert,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda data, *ignored: data,
    "torch._tensor _rebuild_from_type_v2": lambda build, kind, arguments, state: build(*arguments),
    "deepspeed.runtime.zero.config ZeroStageEnum": lambda stage: stage,
    "deepspeed.runtime.fp16.loss_scaler LossScaler": _inert,
    "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler": _inert,
    "deepspeed.utils.tensor_fragment fragment_address": _inert,
} | {f"torch {name}Storage": (lambda dtype: lambda: dtype)(dtype) for name, dtype in STORAGES.items()}
MARK = object()


class Machine:
    """Follows the data instructions of one pickle. `storage(type, key, numel)` finds a persistent id."""

    def __init__(self, storage: Callable[[str, str, int], Storage]):
        self.storage, self.stack, self.memo = storage, [], {}

    def run(self, data: bytes) -> Any:
        """The object that the pickle describes. Raises ValueError for an instruction or a name that is not data."""
        for instruction, argument, _ in pickletools.genops(data):
            name = instruction.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name in LITERALS:
                self.stack.append(argument)
            elif name == "STOP":
                return self.stack.pop()
            elif name in ACTIONS:
                ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"the instruction {name}, which plain tensors do not need")
        raise ValueError("no end")

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        values = tuple(self.stack[-count:])
        if len(values) != count:
            raise ValueError("an empty stack")
        del self.stack[-count:]
        return values

    def find(self, named: str) -> None:
        if named not in NAMES:
            raise ValueError(f"the name {named.replace(' ', '.')!r}, which is not on the list of what weights need")
        self.stack.append(NAMES[named])

    def call(self, ignored: Any) -> None:
        function, arguments = self.last(2)
        if function not in NAMES.values():
            raise ValueError("a call of what is no name")
        self.stack.append(function(*arguments))

    def persistent(self, ignored: Any) -> None:
        _, kind, key, _, numel = self.stack.pop()
        self.stack.append(self.storage(kind(), key, numel))

    def fill(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(pairs[::2], pairs[1::2], strict=True))
        elif not isinstance(target, Inert):
            raise ValueError("items for what is no dictionary")

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for what is no list")
        self.stack[-1].extend(values)

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]


CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict,
             "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": lambda: MARK}  # fmt: skip
LITERALS = frozenset("BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
                     "SHORT_BINBYTES BINBYTES8".split())  # fmt: skip
ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "GLOBAL": lambda machine, name: machine.find(name),
    "STACK_GLOBAL": lambda machine, _: machine.find(" ".join(map(str, machine.last(2)))),
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.call,
    "BUILD": lambda machine, _: machine.last(1),  # the state of an object: attributes that nothing here reads
    "BINPERSID": Machine.persistent,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.last(3)),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.fill(list(machine.last(2))),
    "SETITEMS": lambda machine, _: machine.fill(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.stack[-1].update(machine.since_mark()),
    "BINPUT": Machine.remember,
    "LONG_BINPUT": Machine.remember,
    "MEMOIZE": Machine.remember,
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "POP": lambda machine, _: machine.stack.pop(),
}


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save, its tensors as `Stored`. Raises UsageError; nothing of it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            return _read_members(path, archive, members)
    except (OSError, zipfile.BadZipFile, struct.error) as error:
        raise UsageError(f"{path}: no file of torch.save, or cut short ({error}); nothing was read from it") from None


def _read_members(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> Any:
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1 or members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise UsageError(f"{path}: no file of torch.save (it holds {len(pickles)} data.pkl)")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise UsageError(f"{path}: was written on a big-endian machine; save it again on a little-endian one")

    def storage(dtype: Any, key: Any, numel: Any) -> Storage:
        info = members.get(f"{root}data/{key}")
        if dtype not in DTYPES or info is None or type(numel) is not int or info.file_size != numel * DTYPES[dtype][1]:
            raise ValueError(f"a storage {str(key)[:40]!r} that is not in the file as described")
        return Storage(path, dtype, _data_offset(path, info), numel)

    try:
        return Machine(storage).run(archive.read(pickles[0]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path}: refused; its pickle holds {error}. Nothing of it was executed") from None


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where an uncompressed member's data begin: behind its own header, whose lengths the directory does not tell."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"a storage {info.filename!r} that is compressed or encrypted")
    with open_regular(path) as fd:
        header = bytes(read_at(fd, info.header_offset, LOCAL_HEADER_BYTES, path.name))
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
