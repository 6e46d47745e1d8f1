"""Offline batch sampling: `python tools/sample_batch.py CKPT --input prompts.jsonl --output out.jsonl`.

Every worker (rank of a launcher, task of a Slurm array, or both) makes its share of the samples and appends them to a
part of its own; whoever finds the parts complete merges them in input order. A worker may be a tensor-parallel group of
ranks, whose first one plans and writes for all. Workers do not communicate but for one broadcast at the start.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import DistEnv, dist_env, from_first, start_process_group
from dlm_scale.parallel.mesh import Mesh
from dlm_scale.sampling.settings import FLAG, add_sampling_arguments, check_ranges, check_sampling
from dlm_scale.sampling.settings import longest_canvas, num_steps, stream_settings

_RANGES = {"batch_size": (0, 1 << 20), "num_threads": (1, 4096), "tensor_parallel_size": (1, 4096)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; each takes `--key=value` too."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a run folder (its last good checkpoint) or a checkpoint folder")
    add("--input", metavar="FILE", required=True, help="JSON Lines of requests: id, and prompt, text, tokens or messages")
    add("--output", metavar="FILE", required=True, help="JSON Lines of results, or Parquet where it ends in .parquet")
    add("--batch_size", type=int, default=0, help="canvases at once, any gives the same text; 0 = what memory allows")
    add_sampling_arguments(parser, num_samples=1)
    add("--num_threads", type=int, default=1, help="threads of a process on a CPU (default: 1; rather take more ranks)")
    add("--shard", metavar="I/N", help="do part I (from 0) of N alone; default: the task of a Slurm array")
    add("--merge", default=False, **FLAG, help="sample nothing, merge what the parts hold")
    add("--overwrite", default=False, **FLAG, help="delete the output, finished or not, and start anew")
    add("--tensor_parallel_size", type=int, default=1, help="ranks that share one model (default: 1)")


@dataclass(frozen=True)
class Job:
    """What a rank of a worker needs to know. `mesh`: its place among the ranks of this launch."""

    args: argparse.Namespace
    env: DistEnv
    mesh: Mesh
    state: Any
    worker: int
    num_workers: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for its worker."""
        return self.mesh.tensor_rank == 0


def run(args: argparse.Namespace) -> int:
    """Sample this worker's share. Raises UsageError on bad flags, input, checkpoint or an output that does not fit."""
    job = _job(args)
    if args.merge:
        return _merge(job)
    import torch

    from dlm_scale.engine.runtime import stop_runtime

    torch.set_num_threads(args.num_threads)
    try:
        _sample(_joined(job) if job.env.world_size > 1 else job)
    finally:
        stop_runtime()
    return 0


def _sample(job: Job) -> None:
    from dlm_scale.engine.runtime import stop_runtime
    from dlm_scale.inference import load_for_inference

    args = job.args
    inference = load_for_inference(args.checkpoint, args.device, local_rank=job.env.local_rank, mesh=job.mesh)
    settings = stream_settings(vars(args), inference)
    from_first(job.env.rank == 0, 0, None, lambda: _prepare(job, inference, settings))
    if job.mesh.tensor_size == 1:
        stop_runtime()  # from here on no worker waits for another
    _sample_share(job, inference, settings)


def _job(args: argparse.Namespace) -> Job:
    from dlm_scale.sampling.journal import State

    check_sampling(vars(args))
    check_ranges(vars(args), _RANGES)
    if args.cache != "none":
        raise UsageError("--cache: kept keys would depend on what else is in a pass; leave it out, or use dlm sample")
    env, (shard, num_shards), size = dist_env(), _shard(args.shard, os.environ), args.tensor_parallel_size
    if env.world_size % size and not args.merge:
        raise UsageError(f"--tensor_parallel_size {size} does not divide the {env.world_size} processes of this job: "
                         f"start a multiple of {size} with deepspeed, torchrun or srun, or give another size")
    if args.overwrite and num_shards > 1:
        raise UsageError(f"--overwrite in one of {num_shards} parts would delete what the others make: delete "
                         f"{args.output} and {args.output}.state first, then start all parts without it")
    groups = max(1, env.world_size // size)
    out, worker, num_workers = Path(args.output), shard * groups + env.rank // size, num_shards * groups
    if not out.resolve().parent.is_dir():
        raise UsageError(f"cannot write {out}: its folder does not exist; make it first")
    if out.is_dir() or out.resolve() == Path(args.input).resolve():
        raise UsageError(f"cannot write {out}: it is {'a folder' if out.is_dir() else 'the input'}; choose another "
                         "--output")
    return Job(args, env, Mesh(), State(out, worker, num_workers), worker, num_workers)


def _joined(job: Job) -> Job:
    """The job with its mesh: the ranks meet. Small things travel by gloo wherever the model is."""
    from dlm_scale.engine.runtime import pick_device
    from dlm_scale.parallel.mesh import make_mesh

    is_on_gpu = job.args.tensor_parallel_size > 1 and pick_device(job.args.device, job.env.local_rank).type == "cuda"
    start_process_group(job.env, "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo")
    return replace(job, mesh=make_mesh(job.env.rank, job.env.world_size, job.args.tensor_parallel_size))


def _shard(flag: "str | None", environ: Mapping[str, str]) -> tuple[int, int]:
    """(part, parts) of --shard, else of the Slurm array that this is a task of, else (0, 1)."""
    if flag is not None:
        part, slash, parts = flag.partition("/")
        if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts) <= 99_999):
            raise UsageError(f"--shard {flag!r}: write I/N with I from 0 to N - 1, as 0/4")
        return int(part), int(parts)
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return 0, 1
    names = ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_STEP", "TASK_COUNT")
    try:
        task, least, most, step, count = (int(environ[f"SLURM_ARRAY_{name}"]) for name in names)
    except (KeyError, ValueError) as error:
        raise UsageError(f"this is a task of a Slurm array, but its place is not clear ({error}): give --shard I/N, or "
                         "--shard 0/1 to sample all in this task") from None
    if (most - least) // step + 1 != count:
        raise UsageError("this Slurm array leaves out task numbers: give it as 0-7, or give --shard I/N")
    return (task - least) // step, count


def _prepare(job: Job, inference: Any, settings: dict) -> None:
    """Index the input and write the manifest, or check that they fit what is there."""
    from dlm_scale.data.files import open_regular
    from dlm_scale.sampling.journal import describe, preparing, write_atomic

    state, args = job.state, job.args
    try:
        file = open_regular(args.input)
    except OSError as error:
        raise UsageError(f"--input {args.input}: {error.strerror}") from error
    identity = _identity(args, inference, settings, describe(Path(args.input)))
    wanted = json.dumps(identity, indent=1)
    try:
        with file, preparing(state):
            if args.overwrite:
                state.remove()
            if not _is_begun(state, json.loads(wanted)):
                _write_index(job, inference, file)
                write_atomic(state.manifest, [wanted.encode()])
    except OSError as error:
        raise UsageError(f"cannot write {state.folder} ({error.strerror}): check owner and free space") from error


def _is_begun(state: Any, wanted: dict) -> bool:
    """Whether this job has been begun already. Raises UsageError where another one has, or the output is not ours."""
    from dlm_scale.sampling.journal import differences, read_json

    there = read_json(state.manifest)
    if there is None and state.out.exists():
        raise UsageError(f"{state.out} exists and was not made by this command: choose another --output, or replace it "
                         "with --overwrite")
    if there is not None and (different := list(differences(there, wanted))):
        raise UsageError(f"{state.out} was begun with something else ({'; '.join(different)}): use what it was begun "
                         "with, choose another --output, or start anew with --overwrite")
    return there is not None


def _write_index(job: Job, inference: Any, file: Any) -> None:
    import numpy as np

    from dlm_scale.sampling.journal import write_atomic
    from dlm_scale.sampling.prompt_file import scan

    bad = []
    index = scan(file, _reader(job.args, inference), lambda line, reason: bad.append({"line": line, "error": reason}))
    write_atomic(job.state.errors, (json.dumps(item).encode() + b"\n" for item in sorted(bad, key=lambda x: x["line"])))
    if bad:
        _say(f"{len(bad)} bad lines of {job.args.input} are left out, see {job.state.errors}")
    if not len(index):
        raise UsageError(f"--input {job.args.input} holds no good line ({len(bad)} bad ones, see {job.state.errors})")
    content = io.BytesIO()
    np.save(content, index)
    write_atomic(job.state.index, [content.getbuffer()])


def _reader(args: argparse.Namespace, inference: Any):
    from dlm_scale.checkpoint.files import load_json
    from dlm_scale.sampling.prompt_file import Reader

    longest = longest_canvas(vars(args), inference)
    chat = None if args.chat is None else inference.chat(args.chat)
    return Reader(load_json, inference.tokenizer, inference.vocabulary, longest, args.max_new_tokens,
                  inference.is_autoregressive, chat)


def _identity(args: argparse.Namespace, inference: Any, settings: dict, described: dict) -> dict[str, Any]:
    """All that the text depends on."""
    import torch
    import xxhash

    manifest = (inference.checkpoint.path / "manifest.json").read_bytes()
    as_given = ("steps", "max_new_tokens", "num_samples", "confidence_bias", "logit_bias")
    own = {name: getattr(args, name) for name in as_given}
    return {
        "version": 1,
        "input": described,
        "checkpoint": {"manifest_xxh3_128": xxhash.xxh3_128_hexdigest(manifest), "step": inference.step,
                       "weights": inference.weights},
        "settings": settings | own | {"chat": args.chat and inference.chat(args.chat).template},
        "numerics": {"device": inference.device.type, "torch": torch.__version__, "num_threads": args.num_threads,
                     "cpu": torch.backends.cpu.get_cpu_capability(), **vars(_pass_shape(inference)),
                     "tensor_parallel_size": args.tensor_parallel_size},
    }  # fmt: skip


def _pass_shape(inference: Any) -> Any:
    from dlm_scale.sampling.fixed_shape import PASS_SHAPES

    return PASS_SHAPES[inference.device.type]


def _is_complete(job: Job) -> bool:
    """Whether the output is there, whole. Raises UsageError where it was finished and is not what it was."""
    from dlm_scale.sampling.journal import describe, read_json

    done = read_json(job.state.complete)
    if done is None:
        return False
    if not job.state.out.is_file() or done != describe(job.state.out) | {"results": done.get("results")}:
        raise UsageError(f"{job.state.out} was finished, and has been changed or removed since: make it anew with "
                         "--overwrite")
    job.state.clear()
    if job.env.rank == 0:
        _say(f"{job.state.out} is complete: {done['results']} results; nothing to do")
    return True


@dataclass(frozen=True)
class Plan:
    """What a worker has to do: samples left of its `num_mine`, and canvases at once. None left where all is done."""

    todo: Any
    num_mine: int
    batch_size: int


def _sample_share(job: Job, inference: Any, settings: dict) -> None:
    import numpy as np

    args, state, mesh = job.args, job.state, job.mesh
    index = np.load(state.index, mmap_mode="r")
    lengths, num_open = (index[name].astype(np.int64) for name in ("length", "num_open"))
    distinct, place = np.unique(num_open, return_inverse=True)
    steps = np.array([num_steps(vars(args), inference, int(count)) for count in distinct])[place]
    with ExitStack() as held:
        make_plan = partial(_plan, job, inference, settings, (lengths, steps, num_open), held)
        plan = from_first(job.is_first, mesh.rank - mesh.tensor_rank, mesh.tensor_group, make_plan)
        if plan is None:
            return
        if len(plan.todo):
            _make(job, inference, settings, index, plan, (lengths, steps))
    if job.is_first:
        _merge(job)


def _plan(job: Job, inference: Any, settings: dict, keys: tuple, held: ExitStack) -> "Plan | None":
    """None where the output is complete, else the plan; this worker's lock goes to `held`."""
    from dlm_scale.sampling.batching import share
    from dlm_scale.sampling.journal import find_results, worker_lock

    if _is_complete(job):
        return None
    args, state, (lengths, steps, num_open) = job.args, job.state, keys
    held.enter_context(worker_lock(state))
    mine = share(lengths, steps, num_open, args.num_samples, job.worker, job.num_workers)
    is_done = find_results(state.parts(), len(lengths) * args.num_samples)["size"] > 0
    todo = mine[~is_done[mine]]
    size = args.batch_size
    if not size and len(todo):
        size = _batch_size(job, inference, settings, int(lengths.max()), int(steps.min()))
    return Plan(todo, len(mine), size)


def _make(job: Job, inference: Any, settings: dict, index: Any, plan: Plan, keys: tuple) -> None:
    """Sample what is left, batch by batch, into this worker's part. keys: (length, steps) of each request."""
    from dlm_scale.data.files import open_regular
    from dlm_scale.sampling.batching import batches
    from dlm_scale.sampling.fixed_shape import FixedShapePredict

    args, (lengths, steps) = job.args, keys
    from dlm_scale.sampling.gaussian import one_by_one

    fixed = one_by_one(inference.denoise) if inference.is_gaussian else FixedShapePredict(
        inference.model, inference.vocabulary.mask_id, inference.device, _pass_shape(inference))
    progress = Progress(plan.num_mine, plan.num_mine - len(plan.todo), job.env.rank == 0)
    with open_regular(args.input) as file, _writer(job) as write:
        maker = Maker(index, file, _reader(args, inference), inference, fixed, settings, args.num_samples)
        for batch in batches(plan.todo, lengths, steps, args.num_samples, plan.batch_size):
            begun = time.perf_counter()
            rows = maker.make(batch, int(steps[batch[0] // args.num_samples]))
            write(batch, rows, time.perf_counter() - begun)
            progress.add(len(rows), maker.new_tokens)
    progress.end(fixed)


@contextmanager
def _writer(job: Job) -> Iterator[Callable[[Any, list[dict], float], None]]:
    """`write(batch, rows, seconds)` appends to this worker's part and times; does nothing on its other ranks."""
    from dlm_scale.sampling.journal import Part

    if not job.is_first:
        yield lambda batch, rows, seconds: None
        return
    job.state.own_times.parent.mkdir(exist_ok=True)
    with Part(job.state.part) as part, open(job.state.own_times, "a") as own_times:

        def write(batch: Any, rows: list[dict], seconds: float) -> None:
            part.append(list(zip(batch.tolist(), rows)))
            own_times.write(json.dumps(_times(job, rows, seconds)) + "\n")
            own_times.flush()

        yield write


def _times(job: Job, rows: list[dict], seconds: float) -> dict[str, Any]:
    """A line of OUT.times.jsonl: one batch."""
    return {"worker": job.worker, "rows": len(rows), "length": len(rows[0]["tokens"]),
            "nfe": sum(row["nfe"] for row in rows), "seconds": round(seconds, 4)}  # fmt: skip


@dataclass
class Maker:
    """Turns sample numbers into rows of the output."""

    index: Any
    file: Any
    reader: Any
    inference: Any
    fixed: Any
    settings: dict
    num_samples: int
    new_tokens: int = 0

    def make(self, batch: Any, steps: int) -> list[dict[str, Any]]:
        """The rows of samples whose canvases have one length and `steps` steps."""
        import torch

        from dlm_scale.sampling.prompt_file import noise_address, read_request
        from dlm_scale.sampling.requests import finished
        from dlm_scale.sampling.texts import states

        asked = {int(n): read_request(self.file, self.index[n], self.reader) for n in set(batch // self.num_samples)}
        requests = [(*asked[number], sample) for number, sample in zip(*map(list, divmod(batch, self.num_samples)))]
        canvases = [canvas for _, canvas, _ in requests]
        addresses = [noise_address(request_id, int(sample)) for request_id, _, sample in requests]
        x_BL, is_fixed_BL = (
            torch.tensor([getattr(canvas, name) for canvas in canvases], device=self.inference.device)
            for name in ("ids", "is_fixed")
        )
        predict = self._of_left_context if self.inference.is_autoregressive else self.fixed
        places = {"request_hashes": [low for low, _ in addresses], "sample_indices": [high for _, high in addresses]}
        try:
            *_, made = states(self.inference, x_BL, is_fixed_BL, predict=predict, **places, **self.settings,
                              num_steps=steps)  # fmt: skip
        except ValueError as error:  # settings that only the canvas shows to be impossible, a model that has diverged
            raise UsageError(f"cannot sample the requests of {len(x_BL[0])} tokens: {error}") from error
        self.new_tokens = sum(canvas.num_open for canvas in canvases)
        rows = []
        for (request_id, canvas, sample), ids, nfe in zip(requests, made.x_BL.tolist(), made.nfe_B.tolist()):
            one = finished(int(sample), ids, nfe, canvas, self.settings["stop_ids"], self.inference.tokenizer)
            rows.append({"id": request_id, "sample": one.index, "text": one.text, "tokens": one.ids, "nfe": one.nfe})
        return rows

    def _of_left_context(self, x_BL: Any, rows_N: Any) -> Any:
        read_BL, attention = self.inference.network_input(x_BL)
        return self.fixed(read_BL, rows_N, attention)


def _batch_size(job: Job, inference: Any, settings: dict, length: int, steps: int) -> int:
    """From free memory, for the longest canvas; logged."""
    import torch

    from dlm_scale.sampling.batching import batch_size_for
    from dlm_scale.sampling.samplers import resolve
    from dlm_scale.sampling.selectors import SELECTORS

    if inference.device.type == "cuda":
        free = torch.cuda.mem_get_info(inference.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // job.env.local_world_size
    if inference.is_gaussian:
        looks_at_all = True
    else:
        sampler = resolve(settings["sampler"], settings.get("allow_edits", False))
        looks_at_all = sampler.edits or SELECTORS[sampler.selector].score is not None
    part = 1.0 if looks_at_all else min(1.0, 4 / steps)
    size = batch_size_for(free, length, inference.vocabulary.num_outputs, part)
    if job.env.rank == 0:
        _say(f"batches of {size}: {free / 1e9:.1f} GB free, canvases of up to {length} tokens")
    return size


class Progress:
    """How far this worker is, on stderr, now and then."""

    def __init__(self, total: int, num_done: int, is_shown: bool):
        self.total, self.first, self.done, self.tokens = total, num_done, num_done, 0
        self.is_shown, self.begun = is_shown, time.monotonic()
        self.interval = 1.0 if sys.stderr.isatty() else 10.0
        self.next = self.begun + self.interval
        if is_shown and num_done:
            _say(f"continuing: {num_done} of {total} results of this process are there already")

    def add(self, rows: int, tokens: int) -> None:
        self.done, self.tokens = self.done + rows, self.tokens + tokens
        if self.is_shown and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval
            _say(self._line())

    def _line(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.begun)
        rate = (self.done - self.first) / seconds
        left = int((self.total - self.done) / rate) if rate else 0
        return (f"{self.done} of {self.total} ({100 * self.done / max(1, self.total):.1f} %), {rate:.1f} results/s, "
                f"{self.tokens / seconds:.0f} new tokens/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")

    def end(self, predict: Any) -> None:
        if self.is_shown and self.done > self.first:
            _say(self._line() + copies_text(predict))


def copies_text(predict: Any) -> str:
    """What fixed shapes cost."""
    if not getattr(predict, "num_rows", 0):
        return ""
    return f"; {100 * predict.num_copies / predict.num_rows:.1f} % of the rows computed only filled up a pass"


def _merge(job: Job) -> int:
    import numpy as np

    from dlm_scale.sampling.journal import find_results, merge, read_json
    from dlm_scale.sampling.output import writer_of

    state = job.state
    manifest = read_json(state.manifest)
    if manifest is None:
        raise UsageError(f"there is nothing to merge for {state.out}: {state.manifest} does not exist; sample first")
    total = len(np.load(state.index, mmap_mode="r")) * manifest["settings"]["num_samples"]
    done = merge(state, total, writer_of(state.out))
    if done is not None:
        if job.env.rank == 0:
            _say(f"{state.out} is complete: {done['results']} results")
        return 0
    there = int((find_results(state.parts(), total)["size"] > 0).sum())
    message = f"{state.out}: {there} of {total} results are there"
    if job.args.merge:
        raise UsageError(f"{message}; run the parts that are missing, then --merge again")
    _say(f"{message}; who finishes last merges them")
    return 0


def _say(message: str) -> None:
    print(f"sample_batch: {message}", file=sys.stderr, flush=True)
