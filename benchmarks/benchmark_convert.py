"""A DeepSpeed ZeRO-3 checkpoint of 1 GB of weights to safetensors: this project's converter against zero_to_fp32.

    python benchmarks/benchmark_convert.py [--json] [--repeats 3] [--gigabytes 1.0]

DeepSpeed itself writes the checkpoint, from two ranks. Then both programs convert it in turns, each time in a process
of its own that starts from nothing; the outputs are compared bit for bit. CPU seconds and the peak of resident memory
are those of the whole process, imports included. Ours also flushes what it writes to the disk and reads it again.

cpu_ratio, wall_ratio, memory_ratio: ours / zero_to_fp32, medians over the turns (below 1: ours is better).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, arguments, machine, report

MAKE = """
import sys, torch
from torch import nn
from tests.forked import run_ranks

def make(folder, width, layers):
    from dlm_scale.engine.runtime import import_deepspeed, start_runtime
    start_runtime("cpu", 1, 300)
    deepspeed = import_deepspeed()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
              "zero_allow_untested_optimizer": True}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    engine.save_checkpoint(folder)

run_ranks(2, make, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), seconds=500)
"""
TAIL = """
import json, re, time
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"cpu": time.process_time(), "wall": time.monotonic() - start, "peak": peak}))
"""
ARMS = {
    "ours": "import sys, time; start = time.monotonic()\nfrom dlm_scale.cli import run_command\n"
            "from tools.convert_checkpoint import CONVERT\n"
            "run_command(CONVERT, [sys.argv[1], sys.argv[2] + '.safetensors', '--to=safetensors'], '')\n",
    "zero_to_fp32": "import sys, time; start = time.monotonic()\n"
                    "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
                    "convert(sys.argv[1], sys.argv[2], safe_serialization=True, max_shard_size=None)\n",
}  # fmt: skip
WIDTH = 2048


def run(code: str, *values: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, values)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout


def measure(arm: str, source: Path, target: Path) -> dict[str, float]:
    return json.loads(run(ARMS[arm] + TAIL, source, target).splitlines()[-1])


def same_weights(ours: Path, theirs: Path) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        return set(a.keys()) == set(b.keys()) and all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in a.keys())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of float32 weights (default: %(default)s)")
    parser.set_defaults(repeats=3)
    args = parser.parse_args()
    layers = max(1, round(args.gigabytes * 1e9 / (4 * WIDTH * (WIDTH + 1))))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "checkpoint"
        run(MAKE, source, WIDTH, layers)
        for repeat in range(args.repeats):
            for name in ARMS:
                target = Path(folder) / name
                found[name].append(measure(name, source, target))
                if name == "zero_to_fp32" and repeat == 0:
                    equal = same_weights(Path(folder) / "ours.safetensors", target / "model.safetensors")
            (Path(folder) / "ours.safetensors").unlink()
            shutil.rmtree(Path(folder) / "zero_to_fp32")
    results: dict[str, object] = {"gigabytes": layers * 4 * WIDTH * (WIDTH + 1) / 1e9, "bit_equal": equal}
    for key in ("cpu", "wall", "peak"):
        pairs = [(ours[key], theirs[key]) for ours, theirs in zip(*found.values(), strict=True)]
        results[f"{'memory' if key == 'peak' else key}_ratio"] = statistics.median(a / b for a, b in pairs)
        for name in ARMS:
            results[f"{name}_{key}{'_bytes' if key == 'peak' else '_seconds'}"] = statistics.median(
                value[key] for value in found[name]
            )
    report({**results, **machine()}, args.json)


if __name__ == "__main__":
    main()
