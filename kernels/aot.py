"""Compile every shipped kernel configuration ahead of time, without a GPU, and read out what it uses.

    python -m dlm_scale.kernels.aot [--arch 80 90 100] [--json]

Exit code 1 if a configuration spills registers, exceeds a chip's shared memory, or has a matmul that does not use the
chip's matrix instructions. Needs triton, whose wheel brings the compiler's tools; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import linear_cross_entropy_triton as cross_entropy
from . import masking_triton as masking

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one program: A100, H100 and H200, B200
MATMUL_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


class Case(NamedTuple):
    """A kernel as it is launched. types: of its arguments in order, without the constexprs; `*` marks a pointer, `/16`
    an integer that is a multiple of 16."""

    name: str
    kernel: Any
    types: str
    constants: dict
    options: dict = {}
    has_matmul: bool = False


class Resources(NamedTuple):
    """registers a thread; spill_bytes of stack a thread; shared_bytes a program; the matrix instructions found."""

    case: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]


def cases() -> Iterator[Case]:
    """The configurations that launches of ours take on a GPU; float16 stands for itself in a few, it compiles as
    bfloat16 does."""
    rows = {"BLOCK": masking.BLOCK, "WAIT_BLOCK": masking.WAIT_BLOCK}
    mask_types = "*i64 *i8 *i64 *i32 *fp32 *i32 *i32 *i64 *i8 *i32 *i32 *i64 *i64 *fp32 i32/16 i32 i64 i32"
    for has_maskable in (False, True):
        for by_count in (False, True):
            flags = {"HAS_MASKABLE": has_maskable, "BY_COUNT": by_count}
            yield Case(f"mask{_told(flags)}", masking.mask_kernel, mask_types, flags | rows)
    for dtype, caps in (("bf16", (False, True)), ("fp16", (True,)), ("fp32", (False, True))):
        yield from _chunk_cases(dtype, caps)
        tile = cross_entropy.tile_of(is_float32=dtype == "fp32")
        types = f"*{dtype} *{dtype} *fp32 *i64 *fp32 *fp32 *i32 *fp32 i32 i32 i32/16 i32/16 i32/16 fp32"
        for cap in caps:
            flags = {"HAS_CAP": cap, "HAS_BIAS": True, "AS_FLOAT32": dtype == "fp32"}
            yield Case(f"scores {dtype}{_told(flags)}", cross_entropy.scores_kernel, types, flags | tile,
                       cross_entropy.TILE_OPTIONS, has_matmul=dtype != "fp32")  # fmt: skip
    yield Case("scores join", cross_entropy.join_kernel, "*fp32 *fp32 *i32 *fp32 *fp32 *i64 i32 i32 fp32",
               {"BLOCK": cross_entropy.JOIN_ROWS})  # fmt: skip


def _chunk_cases(dtype: str, all_options: tuple[bool, ...]) -> Iterator[Case]:
    """In the three ways of processing a chunk (float16: in one), without any or with all options."""
    types = f"*{dtype} *fp32 *i64 *fp32 *fp32 i32 i32 i32/16 fp32 fp32 fp32 fp32 fp32"
    ways = ((True, True), (True, False), (False, True))
    for reduce, gradient in ways[:1] if dtype == "fp16" else ways:
        for options in all_options:
            flags = {"REDUCE": reduce, "GRADIENT": gradient, "HAS_CAP": options, "HAS_BIAS": True, "HAS_SHARE": options}
            constants = flags | {"BLOCK": cross_entropy.ROW_BLOCK}
            yield Case(f"chunk {dtype}{_told(flags)}", cross_entropy.chunk_kernel, types, constants,
                       cross_entropy.ROW_OPTIONS)  # fmt: skip


def _told(flags: dict) -> str:
    return "".join(f" {name.lower()}" for name, value in flags.items() if value)


def compile_case(case: Case, arch: int) -> Resources:
    """Compile for compute capability arch / 10."""
    names = [name for name in case.kernel.arg_names if name not in case.constants]
    types = dict(zip(names, case.types.split(), strict=True))
    place = {name: (number,) for number, name in enumerate(case.kernel.arg_names)}
    source = ASTSource(
        fn=case.kernel,
        signature={name: types[name].removesuffix("/16") if name in types else "constexpr" for name in place},
        constexprs={place[name]: value for name, value in case.constants.items()},
        attrs={place[n]: [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*" or t.endswith("/16")},
    )
    options = {"enable_fp_fusion": True} | case.options
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = _assembled(compiled.asm["cubin"])
    found = tuple(name for name in MATMUL_INSTRUCTION.values() if name in compiled.asm["ptx"])
    return Resources(case.name, arch, registers, spill_bytes, compiled.metadata.shared, found)


def _assembled(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of the machine code. Our kernels have no arrays of their own, so a
    stack means spilt registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))


def problems(case: Case, used: Resources) -> list[str]:
    """What keeps this configuration from being shipped."""
    found = []
    if used.spill_bytes:
        found.append(f"spills {used.spill_bytes} bytes")
    if used.shared_bytes > SHARED_LIMIT_BYTES[used.arch]:
        found.append(f"{used.shared_bytes} bytes of shared memory; the limit is {SHARED_LIMIT_BYTES[used.arch]}")
    if case.has_matmul and MATMUL_INSTRUCTION[used.arch] not in used.instructions:
        found.append(f"no {MATMUL_INSTRUCTION[used.arch]}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT_BYTES, default=[*SHARED_LIMIT_BYTES])
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which replaces the compiler: unset it")
    failed = False
    for case in cases():
        for arch in args.arch:
            used = compile_case(case, arch)
            wrong = problems(case, used)
            failed |= bool(wrong)
            if args.json:
                print(json.dumps(used._asdict() | {"problems": wrong}), flush=True)
            else:
                print(f"sm_{arch:<4}{used.registers:>4} registers {used.shared_bytes:>7} B shared "
                      f"{used.spill_bytes:>4} B spilt  {' '.join(used.instructions):<9} {case.name} {wrong or ''}",
                      flush=True)  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
