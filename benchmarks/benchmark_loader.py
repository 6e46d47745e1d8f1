"""Reading training rows, against nanoGPT's get_batch: tokens per CPU second, start, seek, waiting in the real loop.

    python benchmarks/benchmark_loader.py [--json] [--repeats 15] [--only speed packing sparse wait]

speed: `data.rows` (order, reading, check of every id, int64) of a dataset of `--tokens` (60 million) uint16 tokens, B 32,
L 1024, beside get_batch as nanoGPT defines it: open the file anew, stack inputs and targets as int64 tensors. `ratio_*` are
medians over turns; `ratio_ids_windows` is against get_batch without its targets. `batch_*`: noised micro-batches.
packing: time and memory of the plan of so many million documents (lognormal lengths, median 500 tokens), share used.
sparse: a file of 100 GB without blocks; seconds and resident memory from before opening to the first batch, seek_ms to
step 10^6.
wait: share of the time that `dlm train` waits for its next batch, with packing and a mixture (metrics.jsonl's
`data_wait`, all steps together but the first ten).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import xxhash

from benchmarks.common import ROOT, arguments, cpu_seconds, forget_peak, machine, median_ratio, report, resident
from dlm_scale.config import config_from_dict
from dlm_scale.data.indexed import CODES, HEADER, MAGIC
from dlm_scale.data.loader import open_data
from dlm_scale.data.meta import BLOCK_BYTES, DatasetMeta, SplitMeta, TokenizerFiles, write_meta
from dlm_scale.data.packing import make_plan
from dlm_scale.data.prepare import prepare
from dlm_scale.engine.step import micro_batch

B, L = 32, 1024
SPARSE_TOKENS, CALLS = 50_000_000_000, 20
TYPE = np.dtype("<u2")


def write_dataset(folder: Path, lengths: np.ndarray, write_tokens: Callable[[Path], None]) -> str:
    """A dataset of GPT-2's ids whose documents have these lengths; returns its prefix."""
    folder.mkdir()
    ends = np.cumsum(lengths, dtype="<i8") * TYPE.itemsize
    pointers = ends - lengths.astype("<i8") * TYPE.itemsize
    header = HEADER.pack(MAGIC, 1, CODES[TYPE], len(lengths), len(lengths) + 1)
    index = b"".join([header, lengths.astype("<i4").tobytes(), pointers.tobytes(), np.arange(len(lengths) + 1).tobytes()])
    (folder / "train.idx").write_bytes(index)
    write_tokens(folder / "train.bin")
    tokens, size = int(lengths.sum()), int(ends[-1])
    hashes = ("",) * -(-size // BLOCK_BYTES)
    split = SplitMeta(tokens, len(lengths), 4 * tokens, 50256, 10.8, size, hashes, xxhash.xxh3_64_hexdigest(index))
    tokenizer = TokenizerFiles("none", (), "")
    write_meta(DatasetMeta(tokenizer, 50258, 50257, (), 50256, 1, {"train": split}, {}, None), folder / "meta.json")
    return str(folder / "train")


def document_lengths(count: int) -> np.ndarray:
    return np.maximum(1, np.random.default_rng(0).lognormal(np.log(500), 1, count)).astype(np.int64)


def random_dataset(folder: Path, tokens: int) -> str:
    ends = np.cumsum(document_lengths(tokens // 500))
    bounds = np.concatenate([[0], ends[ends < tokens], [tokens]])
    ids = np.random.default_rng(1).integers(0, 50257, tokens).astype(TYPE)
    return write_dataset(folder, np.diff(bounds), ids.tofile)


def get_batch(path: str, with_targets: bool = True) -> list[torch.Tensor]:
    """nanoGPT's, on the CPU."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - L, (B,))
    shifts = (0, 1) if with_targets else (0,)
    return [torch.stack([torch.from_numpy(data[i + s : i + s + L].astype(np.int64)) for i in starts]) for s in shifts]


def speed(folder: Path, repeats: int, tokens: int) -> dict[str, float]:
    prefix = random_dataset(folder / "random", tokens)
    mixture = [{"path": prefix, "weight": 3.0}, {"path": prefix, "weight": 1.0}]
    opened = {f"{kind}_{name}": open_data(source, L, 1, packing)
              for kind, packing in (("windows", "none"), ("packed", "best_fit"))
              for name, source in (("one", prefix), ("mixture", mixture))}  # fmt: skip

    def calls(make: Callable[[np.ndarray], object]) -> Callable[[int], None]:
        def turn(number: int) -> None:
            for i in range(CALLS):
                make(B * (CALLS * (number + 1) + i) + np.arange(B))

        return turn

    arms = {name: calls(data.rows) for name, data in opened.items()}
    arms |= {f"batch_{name}": calls(noised(data, prefix)) for name, data in opened.items() if name.endswith("one")}
    arms |= {"get_batch": calls(lambda _: get_batch(prefix + ".bin")),
             "get_batch_ids": calls(lambda _: get_batch(prefix + ".bin", with_targets=False))}  # fmt: skip
    seconds = cpu_seconds(arms, repeats)
    found = {f"mtokens_per_cpu_second_{k}": CALLS * B * L / statistics.median(s) / 1e6 for k, s in seconds.items()}
    ratios = {f"ratio_{name}": median_ratio(seconds["get_batch"], seconds[name]) for name in opened}
    return found | ratios | {"ratio_ids_windows_one": median_ratio(seconds["get_batch_ids"], seconds["windows_one"])}


def noised(data, prefix: str) -> Callable[[np.ndarray], object]:
    """What the thread ahead of training does for a micro-batch."""
    config = config_from_dict({
        "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 1, "seq_len": L}, "data": {"train": prefix},
        "train": {"global_batch_size": B, "micro_batch_size": B, "num_steps": 1, "out": "unused"},
        "optimizer": {"learning_rate": 1e-3}})  # fmt: skip
    runtime = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(config=config, vocabulary=data.vocabulary, runtime=runtime)
    return lambda sample_B: micro_batch(trainer, data, sample_B, (np.arange(B) + 0.5) / B)


def packing(folder: Path, millions: int = 10) -> dict[str, float]:
    bounds = np.concatenate([[0], np.cumsum(document_lengths(millions * 10**6))])
    forget_peak()
    before, start = resident("VmRSS"), time.process_time()
    plan = make_plan(lambda i, j: bounds[i : j + 1], len(bounds) - 1, L)
    return {"million_documents": millions, "plan_cpu_seconds": time.process_time() - start,
            "plan_peak_mbytes": (resident("VmHWM") - before) / 1e6, "plan_used": plan.used}  # fmt: skip


def sparse(folder: Path) -> dict[str, float]:
    """In a process of its own, which has imported everything but opened nothing."""
    lengths = np.full(100, SPARSE_TOKENS // 100)
    prefix = write_dataset(folder / "sparse", lengths, lambda path: _truncate(path, SPARSE_TOKENS * TYPE.itemsize))
    child = [sys.executable, str(Path(__file__)), "--open", prefix]
    ran = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _truncate(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def open_once(prefix: str) -> dict[str, float]:
    forget_peak()
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    data = open_data(prefix, L, 1)
    data.rows(np.arange(B))
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    grown = resident("VmHWM") - before
    data.rows(np.arange(B) + 512 * 10**6)  # step 10^6 of batches of 512
    return {"sparse_first_batch_seconds": opened - start, "sparse_first_batch_cpu_seconds": cpu, "sparse_grown_mbytes": grown / 1e6,
            "sparse_seek_ms": 1e3 * (time.perf_counter() - opened)}  # fmt: skip


def wait(folder: Path) -> dict[str, float]:
    for name, source in (("docs", "docs/*.md"), ("code", "dlm_scale")):
        if name == "code":
            source = folder / "code.jsonl"
            files = sorted((ROOT / "dlm_scale").rglob("*.py"))
            source.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in files))
        prepare(str(source if name == "code" else ROOT / source), "byte", folder / name)
    mixture = f"[{{path: {folder}/docs/train, weight: 1.0}}, {{path: {folder}/code/train, weight: 3.0}}]"
    overrides = [f"data.train={mixture}", "data.packing=best_fit", "data.random_length_share=0.01", "train.log_every=1",
                 "data.validation=null", "train.num_steps=60", "train.save_every=0", f"train.out={folder}/run"]
    subprocess.run([sys.executable, "-m", "dlm_scale.cli", "train", "configs/quickstart.yaml", *overrides], cwd=ROOT,
                   check=True, stdout=sys.stderr)  # fmt: skip
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line.get("step", 0) > 10 and "data_wait" in line]
    tokens = steps[0]["tokens"] / steps[0]["step"]
    seconds = [tokens / line["tokens_per_second"] for line in steps]
    waited = sum(line["data_wait"] * s for line, s in zip(steps, seconds))
    return {"data_wait": waited / sum(seconds), "step_seconds": statistics.median(seconds)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(repeats=15)
    parser.add_argument("--only", nargs="+", choices=["speed", "packing", "sparse", "wait"],
                        default=["speed", "packing", "sparse", "wait"])  # fmt: skip
    parser.add_argument("--tokens", type=int, default=60_000_000, help="of the dataset of speed")
    parser.add_argument("--open", metavar="PREFIX", help="only open this dataset and read a batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.open:
        return print(json.dumps(open_once(args.open)))
    results = {"benchmark": "loader", "repeats": args.repeats, **machine()}
    parts = {"speed": lambda f: speed(f, args.repeats, args.tokens), "packing": packing, "sparse": sparse, "wait": wait}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            results |= parts[name](Path(folder))
    report(results, args.json)


if __name__ == "__main__":
    main()
