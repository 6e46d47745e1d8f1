"""Are these nodes fit for a run? Each rank writes what it finds (`probe`); one process reads it all (`judge`).

A report is written before the ranks meet, so that a node which hangs or cannot start anything is known by its silence.
The rates are those of an all-reduce over the node, over pairs of nodes, and over all ranks: a node that is slow with
both of its neighbours is the slow one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import dlm_scale
from dlm_scale.errors import UsageError

MEGABYTES, REPEATS = 32, 5  # of an all-reduce; the best counts
SLOW = 0.5  # of the median rate, unless DLM_PREFLIGHT_SLOW says otherwise
CLOCK_SECONDS = 30.0
FREE_SHM, FREE_SCRATCH = 256e6, 1e9  # bytes: gloo and NCCL, compiled kernels
PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
ECC = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")


# --- what a rank finds ----------------------------------------------------------------------------------------------


def code_hash(folder: Path) -> str:
    """Of all Python files below a folder, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def inspect_node(folder: Path, device: str, num_gpus: int) -> dict[str, Any]:
    """This rank's report; `folder` is in the run folder, which all nodes share, and holds the file `token`."""
    shm, scratch = Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))
    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "rank": int(os.environ.get("SLURM_PROCID", "0")),
        "token": (folder / "token").read_text().strip(),
        "code": code_hash(Path(dlm_scale.__file__).parent),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "free_run": shutil.disk_usage(folder).free,
        "free_shm": shutil.disk_usage(shm).free if shm.is_dir() else None,
        "free_scratch": shutil.disk_usage(scratch).free,
        "gpu": None if device == "cpu" else inspect_gpus(num_gpus),
    }


def inspect_gpus(wanted: int) -> dict[str, Any]:
    """Count, uncorrected memory errors, and the checksum of a product of small integers, which must be exact."""
    import torch

    found = torch.cuda.device_count()
    report: dict[str, Any] = {"wanted": wanted, "found": found, "memory_errors": _memory_errors(), "problem": None}
    if not found:
        return report
    try:
        place = torch.device("cuda", int(os.environ.get("SLURM_LOCALID", "0")) % found)
        a = (torch.arange(1024 * 1024, dtype=torch.float32) % 7).reshape(1024, 1024)
        report["is_exact"] = bool(torch.equal((a.to(place) @ a.T.to(place)).cpu(), a @ a.T))
    except RuntimeError as error:
        report["problem"] = str(error).splitlines()[0]
    return report


def _memory_errors() -> dict[str, int]:
    """GPU index -> uncorrected ECC errors since the driver started, where nvidia-smi says so."""
    try:
        lines = subprocess.run(ECC, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.replace(" ", "").split(",") for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def measure_together(device: str, node_of: Sequence[str]) -> dict[str, Any]:
    """Clock at a meeting, and rates of all-reduces in GB/s (bytes of the tensor a second). Collective."""
    import torch
    import torch.distributed as dist

    from dlm_scale.parallel.dist_env import dist_env, start_process_group
    from dlm_scale.engine.runtime import pick_device

    env = dist_env()
    place = pick_device(device, env.local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    start_process_group(env, "nccl" if place.type == "cuda" else "gloo", 300.0)
    payload = torch.ones(MEGABYTES * 250_000, dtype=torch.float32, device=place)
    dist.all_reduce(payload[:1])
    found: dict[str, Any] = {"clock": time.time(), "world": _rate(payload, None)}
    for name, groups in _groups(node_of).items():
        for ranks in groups:
            group = dist.new_group(ranks)
            if env.rank in ranks:
                found[name] = max(found.get(name, 0.0), _rate(payload, group))
    dist.destroy_process_group()
    return found


def _groups(node_of: Sequence[str]) -> dict[str, list[list[int]]]:
    """The ranks of each node, and of neighbouring nodes in two rounds, so that a node meets both of its neighbours."""
    nodes = list(dict.fromkeys(node_of))
    of = {node: [rank for rank, name in enumerate(node_of) if name == node] for node in nodes}
    pairs = [(nodes[i], nodes[i + 1]) for first in (0, 1) for i in range(first, len(nodes) - 1, 2)]
    return {"node": [ranks for ranks in of.values() if len(ranks) > 1], "pair": [of[a] + of[b] for a, b in pairs]}


def _rate(payload: Any, group: Any) -> float:
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(REPEATS):
        dist.barrier(group=group)
        begin = time.perf_counter()
        dist.all_reduce(payload.fill_(1.0), group=group)
        if payload.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    if payload[0].item() != dist.get_world_size(group):
        raise RuntimeError(f"an all-reduce of ones over {dist.get_world_size(group)} ranks gave {payload[0].item()}")
    return payload.numel() * payload.element_size() / min(seconds) / 1e9


def probe(args: argparse.Namespace) -> int:
    report = inspect_node(args.folder, args.device, args.num_gpus)
    _write(args.folder / f"rank_{report['rank']}.json", report)
    names = _all_nodes(args.folder, int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    _write(args.folder / f"rank_{report['rank']}.json", report | measure_together(args.device, names))
    return 0


def _write(path: Path, report: dict[str, Any]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(report))
    os.replace(path.with_suffix(".tmp"), path)


def _all_nodes(folder: Path, world_size: int) -> list[str]:
    """The node of each rank, once all have reported; half of the preflight's time is given to that."""
    patience = float(os.environ.get("DLM_PREFLIGHT_SECONDS", "600")) / 2
    deadline = time.monotonic() + patience
    while len(reports := read_reports(folder)) < world_size:
        if time.monotonic() > deadline:
            missing = sorted(set(range(world_size)) - set(reports))
            raise RuntimeError(f"no report of ranks {missing[:8]} within {patience:g} s")
        time.sleep(0.5)
    return [reports[rank]["host"] for rank in range(world_size)]


# --- what follows from it -------------------------------------------------------------------------------------------


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("rank_*.json")}


def find_faults(reports: dict[int, dict[str, Any]], nodes: Sequence[str], num_ranks: int) -> dict[str, list[str]]:
    """Node -> what is wrong with it; `nodes` in Slurm's order, with the same number of ranks on each."""
    each = num_ranks // len(nodes)
    of = {node: [reports.get(rank) for rank in range(i * each, (i + 1) * each)] for i, node in enumerate(nodes)}
    found = {node: list(dict.fromkeys(_node_faults(of[node]))) for node in nodes}
    for node, text in _against_the_others({node: rs for node, rs in of.items() if all(rs)}):
        found[node].append(text)
    silent = [node for node in nodes if None in of[node]]
    if not silent:  # else the meeting failed for want of them
        for node in nodes:
            if any("world" not in report for report in of[node] if report):
                found[node].append("its ranks did not come through the all-reduce")
    return {node: texts for node, texts in found.items() if texts}


def _node_faults(reports: Sequence[dict[str, Any] | None]) -> Iterator[str]:
    for report in reports:
        if report is None:
            yield "no report: it does not run the job's processes, or does not see the run folder"
            continue
        if (report["free_shm"] or FREE_SHM) < FREE_SHM:
            yield f"/dev/shm has {report['free_shm'] / 1e6:.0f} MB left"
        if report["free_scratch"] < FREE_SCRATCH:
            yield f"its scratch disk has {report['free_scratch'] / 1e6:.0f} MB left"
        yield from _gpu_faults(report["gpu"])


def _gpu_faults(gpu: dict[str, Any] | None) -> Iterator[str]:
    if gpu is None:
        return
    if gpu["found"] < gpu["wanted"]:
        yield f"{gpu['found']} of {gpu['wanted']} GPUs"
    if gpu["problem"]:
        yield f"a GPU fails: {gpu['problem']}"
    if gpu.get("is_exact") is False:
        yield "a GPU multiplies wrongly"
    if wrong := {index: count for index, count in gpu["memory_errors"].items() if count}:
        yield f"uncorrected memory errors of GPUs {wrong}"


def _against_the_others(of: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """What only shows beside the other nodes: the majority is right."""
    for key in ("token", "code", "python", "packages"):
        values = {node: json.dumps(reports[0][key], sort_keys=True) for node, reports in of.items()}
        usual = statistics.mode(values.values()) if values else None
        yield from ((node, f"{key} {value} where the others have {usual}") for node, value in values.items()
                    if value != usual)
    yield from _outliers(of, "clock", "its clock is {0:.0f} s off", lambda x, m: abs(x - m) > CLOCK_SECONDS,
                         lambda x, m: x - m)
    slow = float(os.environ.get("DLM_PREFLIGHT_SLOW", SLOW))
    for key, what in (("node", "between its own GPUs"), ("pair", "to the nodes beside it")):
        yield from _outliers(of, key, f"all-reduce {what} at {{0:.2g}} of the others' rate",
                             lambda x, m: x < slow * m, lambda x, m: x / m)


def _outliers(of, key: str, text: str, is_out, figure) -> Iterator[tuple[str, str]]:
    values = {node: reports[0][key] for node, reports in of.items() if key in reports[0]}
    if values:
        middle = statistics.median_high(values.values())
        yield from ((node, text.format(figure(x, middle))) for node, x in values.items() if is_out(x, middle))


def judge(args: argparse.Namespace) -> int:
    """Print the bad nodes, one a line, their faults on stderr. Raises UsageError where none of several is good."""
    nodes = args.nodes.split(",")
    reports = read_reports(args.folder)
    faults = find_faults(reports, nodes, args.num_ranks)
    rates = [report["world"] for report in reports.values() if "world" in report]
    if rates:
        print(f"preflight: all-reduce of {MEGABYTES} MB over all ranks: {min(rates):.3g} GB/s", file=sys.stderr)
    texts = [f"{node}: {'; '.join(found)}" for node, found in faults.items()]
    if len(faults) == len(nodes) > 1:
        raise UsageError("preflight: no node is good, so the fault is none of theirs alone: " + " | ".join(texts))
    for node, text in zip(faults, texts):
        print(f"preflight: bad node {text}", file=sys.stderr)
        print(node)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="probe|judge")
    probing, judging = commands.add_parser("probe"), commands.add_parser("judge")
    for command in (probing, judging):
        command.add_argument("folder", type=Path)
    probing.add_argument("device")
    probing.add_argument("num_gpus", type=int)
    probing.set_defaults(act=probe)
    judging.add_argument("num_ranks", type=int)
    judging.add_argument("nodes", help="comma-separated, in Slurm's order")
    judging.set_defaults(act=judge)


def main() -> int:
    from dlm_scale.cli import Parser, exit_code

    parser = Parser(prog="preflight", description=__doc__)
    add_arguments(parser)
    return exit_code(lambda: (args := parser.parse(sys.argv[1:])).act(args), "preflight")


if __name__ == "__main__":
    sys.exit(main())
