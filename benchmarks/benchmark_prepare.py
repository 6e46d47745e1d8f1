"""`dlm prepare` against a preparation as nanoGPT's: tokens per CPU second on the same cores, ids equal; memory; verify.

    python benchmarks/benchmark_prepare.py --ranks gpt2.tiktoken [--text wikitext.txt ...] [--json]

The corpus is Python's standard library and the texts given (a new document at each article of a wikitext file),
repeated up to --megabytes, as JSON Lines. The other side is written from the definition of nanoGPT's prepare.py:
`datasets.map` over rows with tiktoken's encode_ordinary and a separator, then a memmap filled from batches. CPU
seconds are those of all processes of a run, imports included; the two take turns.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import ROOT, arguments, machine, median_ratio, report

SEPARATOR = 50256
TITLE = re.compile(r"^(?= = [^=].* = $)", re.MULTILINE)


def make_corpus(path: Path, texts: list[Path], megabytes: int) -> int:
    """JSON Lines of at least so many megabytes; returns the bytes of text that are not repetitions."""
    from dlm_scale.data.corpora import stdlib_source

    articles = (article for text in texts for article in TITLE.split(text.read_text()) if article)
    documents = itertools.chain((d.text for d in stdlib_source().documents()), articles)
    sizes: list[int] = []

    def lines():
        for text in documents:
            sizes.append(len(text.encode()))
            yield json.dumps({"text": text}) + "\n"

    with open(path, "w") as file:
        for line in itertools.cycle(lines()):
            file.write(line)
            if file.tell() >= megabytes << 20:
                return sum(sizes)


def nanogpt(corpus: Path, ranks: Path, out: Path, num_proc: int) -> None:
    """In a process of its own: load, map, memmap."""
    import datasets

    from dlm_scale.data.tokenizer import make_tokenizer

    bpe = tiktoken_of(make_tokenizer(str(ranks)).files["gpt2.tiktoken"])

    def process(example):
        ids = bpe.encode_ordinary(example["text"])
        ids.append(SEPARATOR)
        return {"ids": ids, "len": len(ids)}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    tokenized = rows.map(process, remove_columns=["text"], num_proc=num_proc)
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    array, at = np.memmap(out / "all.bin", dtype=np.uint16, mode="w+", shape=(total,)), 0
    shards = min(1024, len(tokenized))
    for i in range(shards):
        batch = tokenized.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")[:]
        ids = np.concatenate(batch["ids"])
        array[at : at + len(ids)] = ids
        at += len(ids)
    array.flush()


def tiktoken_of(ranks: bytes):
    """tiktoken's own encoding of these ranks, with the faster of its two equivalent patterns."""
    import base64

    import tiktoken

    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    pairs = (line.split() for line in ranks.splitlines())
    known = {base64.b64decode(token): int(rank) for token, rank in pairs}
    special = {"<|endoftext|>": SEPARATOR}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=known, special_tokens=special)


def run(command: list[str]) -> dict[str, float]:
    """CPU seconds, wall seconds, and the peak of the resident memory of all its processes together."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), **quiet)
    while process.poll() is None:
        peak = max(peak, family_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.monotonic() - start, "peak": peak}


def environment() -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    return os.environ | ours


def family_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants now; pages that several share count for each of them."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = int(status.split("VmRSS:")[1].split()[0]) << 10 if "VmRSS:" in status else 0
    return own + sum(family_bytes(int(child)) for child in children)


def compare(folder: Path, args) -> dict:
    corpus = folder / "corpus.jsonl"
    unique = make_corpus(corpus, args.text, args.megabytes)
    theirs = [sys.executable, __file__, "--as_nanogpt", str(corpus), str(args.ranks), str(folder / "theirs"),
              str(args.workers)]  # fmt: skip
    ours = [sys.executable, "-m", "dlm_scale.cli", "prepare", str(corpus), "--tokenizer", str(args.ranks), "--out",
            str(folder / "ours"), "--workers", str(args.workers)]  # fmt: skip
    found: dict[str, list[dict]] = {"ours": [], "nanogpt": []}
    for _ in range(args.repeats):
        for name, command in (("ours", ours), ("nanogpt", theirs)):
            shutil.rmtree(folder / ("ours" if name == "ours" else "theirs"), ignore_errors=True)
            (folder / "theirs").mkdir(exist_ok=True)
            found[name].append(run(command))
    tokens = os.path.getsize(folder / "theirs" / "all.bin") // 2
    cpu = {name: [r["cpu"] for r in results] for name, results in found.items()}
    return {
        "corpus_megabytes": os.path.getsize(corpus) >> 20,
        "corpus_megabytes_once": unique >> 20,
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / float(np.median(cpu["ours"])),
        "tokens_per_cpu_second_nanogpt": tokens / float(np.median(cpu["nanogpt"])),
        "ratio": median_ratio(cpu["nanogpt"], cpu["ours"]),
        "wall_seconds": float(np.median([r["wall"] for r in found["ours"]])),
        "wall_seconds_nanogpt": float(np.median([r["wall"] for r in found["nanogpt"]])),
        "peak_resident_megabytes": max(r["peak"] for r in found["ours"]) >> 20,
        "peak_resident_megabytes_nanogpt": max(r["peak"] for r in found["nanogpt"]) >> 20,
        "ids_equal": ids_equal(folder / "ours", folder / "theirs" / "all.bin"),
    } | verify_speed(folder / "ours" / "train")


def ids_equal(ours: Path, theirs: Path) -> bool:
    """Whether each document of theirs is the next one of one of our splits, and nothing is left over."""
    from dlm_scale.data.indexed import IndexedDataset

    ids = np.fromfile(theirs, np.uint16)
    ends = np.flatnonzero(ids == SEPARATOR) + 1
    splits = [IndexedDataset(ours / name) for name in ("train", "val")]
    at = [0, 0]
    for start, stop in zip(np.append(0, ends[:-1]), ends, strict=True):
        document = ids[start:stop]
        for k, data in enumerate(splits):
            if np.array_equal(data.tokens[at[k] : at[k] + len(document)], document):
                at[k] += len(document)
                break
        else:
            return False
    return [len(data.tokens) for data in splits] == at


def verify_speed(prefix: Path) -> dict[str, float]:
    """Of `dlm data verify`, the file being in the page cache."""
    from dlm_scale.data.verify import verify

    seconds = []
    for _ in range(3):
        start = time.process_time()
        verify(str(prefix))
        seconds.append(time.process_time() - start)
    return {"verify_gbytes_per_cpu_second": os.path.getsize(f"{prefix}.bin") / min(seconds) / 1e9}


def killed_at_random_moments(folder: Path, kills: int, megabytes: int, seed: int) -> dict:
    """Prepare, be killed at a random moment, be started again: how often the files were those of an unharmed run."""
    rng, corpus = random.Random(seed), folder / "some.jsonl"
    make_corpus(corpus, [], megabytes)
    command = [sys.executable, str(Path(__file__)), "--as_prepare", str(corpus)]

    def files(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    start = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True, env=environment(), stderr=subprocess.DEVNULL)
    seconds, expected, identical, done = time.monotonic() - start, files(folder / "whole"), 0, 0
    while done < kills:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([*command, str(out)], env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 1) * seconds)
        process.kill()
        if process.wait() == 0:
            continue  # it was faster
        done += 1
        is_whole = (out / "meta.json").exists() and not (out / ".preparing").exists()  # killed behind its last step
        if not is_whole:
            again = subprocess.run([*command, str(out)], env=environment(), stderr=subprocess.DEVNULL)
            is_whole = again.returncode == 0
        identical += is_whole and files(out) == expected
    return {"kills": kills, "identical": identical}


def main() -> None:
    if sys.argv[1:2] == ["--as_nanogpt"]:
        corpus, ranks, out, workers = sys.argv[2:]
        return nanogpt(Path(corpus), Path(ranks), Path(out), int(workers))
    if sys.argv[1:2] == ["--as_prepare"]:
        from dlm_scale.data.prepare import prepare

        prepare(sys.argv[2], "byte", sys.argv[3], workers=2, chunk_bytes=1 << 19)
        return None
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--ranks", type=Path, required=True, help="GPT-2's ranks file")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a wikitext file; may be repeated")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=2, help="processes on either side")
    parser.add_argument("--kills", type=int, default=10, help="times that a run is killed and continued")
    args = parser.parse_args()
    results = {"benchmark": "prepare", "repeats": args.repeats, "workers": args.workers} | machine()
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name), args) | killed_at_random_moments(Path(name), args.kills, 8, seed=1)
    report(results | found, args.json)
    return None


if __name__ == "__main__":
    main()
