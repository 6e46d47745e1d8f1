"""Ingredients of malicious files: code in every wrapping that some reader unpacks, and forged checkpoints to carry it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dlm_scale.checkpoint.manifest import HASH_PREFIX
from tests.faults.specimen import Specimen

SECRET = "the-secret-outside-of-the-folder"


@dataclass(frozen=True)
class Scene:
    """Where an attack happens: the specimen, a file that must never appear, one that must never be read."""

    specimen: Specimen
    canary: Path
    secret: Path

    @property
    def newest(self) -> Path:
        return self.specimen.checkpoint(2)

    @property
    def data(self) -> Path:
        return self.specimen.prefix.parent

    @property
    def command(self) -> str:
        return f"touch {self.canary}"

    @property
    def python(self) -> str:
        """Python source that leaves the canary."""
        return f"open({str(self.canary)!r}, 'w').close()"


@dataclass(frozen=True)
class Attack:
    """`plant(scene)` puts it in place. `on`: which entry points meet it (names of tests.faults.audited.ENTRIES).

    `must_be_refused`: some entry point has to raise UsageError; otherwise the file may just as well be ignored.
    """

    name: str
    plant: Callable[[Scene], None]
    on: str
    must_be_refused: bool = False


def pickle_of(scene: Scene) -> bytes:
    """os.system by name."""
    return b"cos\nsystem\n(S" + repr(scene.command).encode() + b"\ntR."


def pickle_exec(scene: Scene) -> bytes:
    """builtins.exec, in a newer protocol's opcodes."""
    code = scene.python.encode()
    return b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93B" + len(code).to_bytes(4, "little") + code + b"\x85R."


def torch_file(scene: Scene) -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(scene))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def numpy_file(scene: Scene) -> bytes:
    """An .npy whose objects are a pickle."""
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + pickle_of(scene)


def numpy_zip(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_0.npy", numpy_file(scene))
    return buffer.getvalue()


def tar_of(scene: Scene) -> bytes:
    """A WebDataset shard whose members are pickles under every suffix that some decoder knows."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for suffix, data in (("pyd", pickle_of(scene)), ("pickle", pickle_exec(scene)), ("pth", torch_file(scene)),
                             ("npy", numpy_file(scene)), ("npz", numpy_zip(scene)), ("txt", b"text")):
            member = tarfile.TarInfo(f"sample.{suffix}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


WRAPPINGS = {"pickle": pickle_of, "pickle 4": pickle_exec, "torch": torch_file, "npy": numpy_file, "npz": numpy_zip}


def reseal(folder: Path, change: Callable[[dict], None] = lambda body: None) -> None:
    """Write the manifest anew so that it vouches for whatever lies in the folder now; `change` edits its body."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["manifest_xxh3_128"]
    for file in folder.iterdir():
        if file.is_file() and file != path:
            data = file.read_bytes()
            body["files"][file.name] = {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(HASH_PREFIX + xxhash.xxh3_128_hexdigest(text).encode() + b'",' + text[1:])


def forged(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    """A file of the newest checkpoint with other content, and a manifest that vouches for it."""
    def plant(scene: Scene) -> None:
        (scene.newest / name).write_bytes(content(scene))
        reseal(scene.newest)

    return plant


def planted(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    """A further file in the newest checkpoint and in the run folder, which no manifest knows."""
    def plant(scene: Scene) -> None:
        for folder in (scene.newest, scene.specimen.run, scene.newest.parent):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(scene))

    return plant


def in_data(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    """A file of the dataset's folder."""
    return lambda scene: (scene.data / name).write_bytes(content(scene)) and None


def source_file(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    """A file of a folder of texts to be prepared."""
    def plant(scene: Scene) -> None:
        folder = scene.data.parent / "source"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(scene))

    return plant


def text(value: str) -> Callable[[Scene], bytes]:
    """Bytes of a text in which COMMAND, PYTHON, CANARY and SECRET stand for those of the scene."""
    def content(scene: Scene) -> bytes:
        filled = value.replace("COMMAND", scene.command).replace("PYTHON", scene.python)
        return filled.replace("CANARY", str(scene.canary)).replace("SECRET", str(scene.secret)).encode()

    return content
