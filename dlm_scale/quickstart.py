"""`make quickstart`: the whole way on this machine, from text to samples, and where everything lies.

Each stage is the public command that a user would type; only the infilling of functions goes through the library.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA, RUN, CONFIG = Path("data/stdlib"), Path("runs/quickstart"), Path("configs/quickstart.yaml")
NUM_FUNCTIONS, HOLE_BYTES = 32, 12
MOST_RANKS_ON_CPU = 2


def main() -> None:
    os.chdir(Path(__file__).parents[1])  # the configs and folders named here are the repository's own
    stage(1, "prepare the Python standard library's own sources as bytes")
    if not (DATA / "meta.json").exists():
        command("-m", "dlm_scale.cli", "prepare", "stdlib", "--tokenizer", "byte", "--out", str(DATA))
    ranks = num_ranks()
    stage(2, f"train {CONFIG} through the deepspeed launcher, {ranks} ranks")
    train(ranks)
    stage(3, "evaluate")
    report = json.loads(command("-m", "dlm_scale.cli", "evaluate", str(RUN), "--max_rows=512", "--json", capture=True))
    stage(4, "sample: infill functions of the validation files, then free text")
    infills = infill_functions()
    text = command("-m", "dlm_scale.cli", "sample", str(RUN), "--num_samples=1", "--max_new_tokens=120", "--seed=3",
                   "--animate=False", f"--png={RUN}/plots/denoising.png", f"--html={RUN}/plots/denoising.html",
                   capture=True)
    print(textwrap.indent(text, "  | "))
    finish(report, infills)


def stage(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def command(*arguments: str, capture: bool = False) -> str:
    """Run a Python command line of ours; its failure ends the quickstart with the same exit code."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def num_ranks() -> int:
    """One rank a GPU; without GPUs one a core, at most two."""
    import torch

    return torch.cuda.device_count() or min(MOST_RANKS_ON_CPU, len(os.sched_getaffinity(0)))


def train(ranks: int) -> None:
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    # The launcher starts its children by name: they must be this interpreter's.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command(*launcher, "--module", "dlm_scale.train", str(CONFIG))


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Infills:
    """How many of the filled functions `ast.parse`, by the model and by bytes drawn from the text's own frequencies."""

    total: int
    parsed: int
    parsed_by_frequency: int


def infill_functions() -> Infills:
    """Cut 12 bytes out of short functions that the model has not seen, fill the hole, see whether Python reads it."""
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(RUN)
    tokens = validation_bytes()
    functions = list(pick_functions(tokens, inference.seq_len))
    filled = fill(inference, functions)
    for (before, _, after), whole in list(zip(functions, filled))[:3]:
        hole = whole[len(before) : len(whole) - len(after)]
        print(textwrap.indent(f"{before.decode()}\033[32m{printable(hole)}\033[0m{after.decode()}\n", "  | "))
    frequencies = np.bincount(np.frombuffer(tokens, dtype=np.uint8), minlength=256) / len(tokens)
    draw = np.random.default_rng(0)
    guesses = [before + draw.choice(256, len(hole), p=frequencies).astype(np.uint8).tobytes() + after
               for before, hole, after in functions]
    return Infills(len(functions), sum(map(parses, filled)), sum(map(parses, guesses)))


def validation_bytes() -> bytes:
    from dlm_scale.data.indexed import IndexedDataset

    return IndexedDataset(DATA / "val").tokens.astype(np.uint8).tobytes()


def pick_functions(text: bytes, seq_len: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(before, hole, after) of functions of two lines or more that fit the context; zero bytes separate the files."""
    found = 0
    for document in text.split(b"\0"):
        source = document.decode()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            function = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])).encode()
            header = function.find(b"\n")
            if header < 0 or not header + HOLE_BYTES + 8 < len(function) <= seq_len or not parses(function):
                continue
            start = header + 4 + (len(function) - header - HOLE_BYTES - 4) // 2
            yield function[:start], function[start : start + HOLE_BYTES], function[start + HOLE_BYTES :]
            found += 1
            if found == NUM_FUNCTIONS:
                return
            break  # one a file, for variety


def fill(inference: Any, functions: list[tuple[bytes, bytes, bytes]]) -> list[bytes]:
    import torch

    from dlm_scale.sampling.engine import generate

    mask_id, filled = inference.vocabulary.mask_id, []
    for before, hole, after in functions:
        ids = [*before, *[mask_id] * len(hole), *after]
        x_BL = torch.tensor([ids], device=inference.device)
        made = generate(inference.predict, x_BL, x_BL != mask_id, sampler="entropy", num_steps=len(hole), seed=0,
                        request_hashes=[zlib.crc32(before)], sample_indices=[0], mask_id=mask_id, temperature=0.5)
        filled.append(bytes(made.ids_BL[0].tolist()))
    return filled


def parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def printable(data: bytes) -> str:
    return data.decode(errors="replace").replace("\0", "?")


def finish(report: dict[str, Any], infills: Infills) -> None:
    """The summary: the model's bits per byte beside the yardsticks on the same text, and the next steps."""
    from dlm_scale.data.compressed_baselines import baselines

    yardsticks = baselines(validation_bytes())
    unigram = yardsticks["unigram_bits_per_byte"]
    below = 1 - report["bits_per_byte"] / unigram
    summary = {**report, **yardsticks, "below_unigram": below, "infills": vars(infills)}
    (RUN / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"""
validation NELBO  <= {report['bits_per_byte']:.3f} bits per byte (standard error {report['bits_per_byte_se']:.3f}), \
step {report['step']}
on the same text:    unigram entropy {unigram:.3f}, gzip -9 {yardsticks['gzip9_bits_per_byte']:.3f}, \
xz {yardsticks['xz_bits_per_byte']:.3f} bits per byte (the model is {below:.0%} below the unigram entropy)
infilled functions   {infills.parsed} of {infills.total} parse as Python \
({infills.parsed_by_frequency} of {infills.total} with bytes drawn by frequency)
everything lies in   {RUN}/: config.yaml, metrics.jsonl, train.log, status.json, report.json, checkpoints/,
                     plots/curves.png, plots/denoising.png
next                 .venv/bin/dlm sample {RUN} --prompt "def main(" --sampler ancestral
                     .venv/bin/dlm prepare YOUR.txt --tokenizer byte --out data/mine
                     .venv/bin/deepspeed --num_gpus 2 --module dlm_scale.train {CONFIG} data.train=data/mine/train \
data.validation=data/mine/val train.out=runs/mine""")


if __name__ == "__main__":
    main()
