"""Offline batch sampling: the same bytes whatever the batch, the ranks, the order and the kills."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import types

import numpy as np
import pytest
import torch

from dlm_scale.cli import Command, exit_code, run_command
from dlm_scale.sampling import batching, journal, prompt_file
from tests.faults.specimen import make_specimen
from tests.forked import run_ranks

COMMAND = Command("", "dlm_scale.sample_batch")
FLAGS = ("--num_samples=2", "--steps=6", "--seed=3")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_specimen(tmp_path_factory.mktemp("specimen")).run


@pytest.fixture
def work(run_folder, tmp_path, monkeypatch):
    """`work(*flags)` samples into out.jsonl and gives the exit code; `work.said` is what it wrote on stderr."""
    for name in ("RANK", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags, out="out.jsonl", prompts="in.jsonl"):
        stderr = io.StringIO()
        arguments = [str(run_folder), f"--input={tmp_path / prompts}", f"--output={tmp_path / out}", *FLAGS, *flags]
        with contextlib.redirect_stderr(stderr):
            code = exit_code(lambda: run_command(COMMAND, arguments, "sample_batch"))
        run.said = stderr.getvalue()
        return code

    def read(out="out.jsonl"):
        return (tmp_path / out).read_bytes()

    run.folder, run.read, run.said, run.state = tmp_path, read, "", tmp_path / "out.jsonl.state"
    write_prompts(tmp_path / "in.jsonl", mixed_requests(24))
    return run


def mixed_requests(count: int) -> list[dict]:
    kinds = (
        lambda i: {"id": f"a{i}", "prompt": "the quick brown"[: i % 9], "max_new_tokens": 1 + i % 5},
        lambda i: {"id": i, "text": "fox <mask:3> ov<mask>"},
        lambda i: {"id": f"t{i}", "tokens": [1, 2, 3]},
        lambda i: {"id": f"m{i}", "tokens": [1, 29, 3, 29][: 2 + i % 3]},
    )
    return [kinds[i % 4](i) for i in range(count)]


def write_prompts(path, requests) -> None:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))


def rows_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def calm_folder(run_folder, tmp_path_factory):
    """What one calm run leaves."""
    folder = tmp_path_factory.mktemp("calm")
    write_prompts(folder / "in.jsonl", mixed_requests(24))
    flags = [str(run_folder), f"--input={folder / 'in.jsonl'}", f"--output={folder / 'out.jsonl'}", *FLAGS]
    assert run_command(COMMAND, flags, "sample_batch") == 0
    return folder


@pytest.fixture
def whole(work, calm_folder):
    """The output of a calm run, which lies in work.folder as if it had been made there."""
    shutil.copytree(calm_folder, work.folder, dirs_exist_ok=True)
    return work.read()


def test_every_request_comes_back_in_order_on_its_own_canvas(work, whole):
    rows, requests = rows_of(whole), mixed_requests(24)
    assert [(row["id"], row["sample"]) for row in rows] == [(r["id"], s) for r in requests for s in range(2)]
    assert list(rows[0]) == ["id", "sample", "text", "tokens", "nfe"]
    for row, request in zip(rows[::2], requests):
        if "prompt" in request:
            assert row["text"].startswith(request["prompt"])
            assert len(row["text"]) == len(request["prompt"]) + request["max_new_tokens"]
        elif "text" in request:
            assert row["text"][:4] == "fox " and row["text"][7:10] == " ov" and len(row["text"]) == 11
        elif 29 in request["tokens"]:
            assert [a for a, b in zip(row["tokens"], request["tokens"]) if b != 29] == [
                b for b in request["tokens"] if b != 29
            ]
        else:
            assert row["tokens"][:3] == [1, 2, 3] and len(row["tokens"]) == 16
        assert 29 not in row["tokens"] and 1 <= row["nfe"] <= 6
    assert len({row["text"] for row in rows if row["id"] in ("t2", "t6", "t10")}) == 6  # own random numbers each
    times = rows_of(work.read("out.jsonl.times.jsonl"))
    assert sum(batch["rows"] for batch in times) == 48 and "seconds" not in str(whole)
    assert sum(batch["nfe"] for batch in times) == sum(row["nfe"] for row in rows)


SAMPLING = {
    "ancestral": ["--sampler=ancestral"],
    "an order": ["--sampler=entropy"],
    "blocks beyond the context": ["--block_size=8", "--max_new_tokens=21", "--guidance=0.5", "--logit_bias=e=-inf"],
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_batch_size_does_not_show(work, name):
    assert work(*SAMPLING[name], out="auto.jsonl") == 0 and "batches of" in work.said
    for size in (1, 7, 64):
        assert work(*SAMPLING[name], f"--batch_size={size}", out=f"{size}.jsonl") == 0
        assert work.read(f"{size}.jsonl") == work.read("auto.jsonl")


def test_the_order_of_the_input_does_not_show(work, whole):
    requests = mixed_requests(24)
    write_prompts(work.folder / "reversed.jsonl", requests[::-1])
    assert work(out="back.jsonl", prompts="reversed.jsonl") == 0
    assert sorted(work.read("back.jsonl").splitlines()) == sorted(whole.splitlines())
    assert rows_of(work.read("back.jsonl"))[0]["id"] == requests[-1]["id"]
    write_prompts(work.folder / "few.jsonl", requests[5:9])
    assert work(out="few_out.jsonl", prompts="few.jsonl") == 0
    assert set(work.read("few_out.jsonl").splitlines()) < set(whole.splitlines())


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_do_not_show(work, whole, world_size):
    codes = run_ranks(world_size, lambda: work("--batch_size=5", out="ranks.jsonl"))
    assert codes == [0] * world_size and work.read("ranks.jsonl") == whole
    times = rows_of(work.read("ranks.jsonl.times.jsonl"))
    assert {batch["worker"] for batch in times} == set(range(world_size))
    assert run_ranks(2, lambda: (work("--overwrite", out="ranks.jsonl"), work.said)) == [(0, ANY_TEXT), (0, ANY_TEXT)]
    assert work.read("ranks.jsonl") == whole


@pytest.mark.parametrize("size, world_size", [(2, 2), (2, 4), (4, 4)])
def test_tensor_parallel_groups_make_the_same_text(work, whole, size, world_size):
    """Not the same bits: sums over ranks round differently, and no draw of so few is that close to a bound."""
    flags = (f"--tensor_parallel_size={size}", "--batch_size=5")
    codes = run_ranks(world_size, lambda: work(*flags, out="split.jsonl"))
    assert codes == [0] * world_size and work.read("split.jsonl") == whole
    assert {batch["worker"] for batch in rows_of(work.read("split.jsonl.times.jsonl"))} == set(range(world_size // size))
    assert run_ranks(world_size, lambda: work(*flags, out="split.jsonl")) == [0] * world_size  # nothing left to do
    assert run_ranks(2, lambda: work(out="split.jsonl")) == [2, 2]  # other numerics


def test_the_batch_size_does_not_show_in_a_tensor_parallel_group(work):
    for size in (1, 7, 64):
        flags = ("--tensor_parallel_size=2", f"--batch_size={size}")
        assert run_ranks(2, lambda: work(*flags, out=f"{size}.jsonl")) == [0, 0]
    assert work.read("1.jsonl") == work.read("7.jsonl") == work.read("64.jsonl")


def test_a_killed_tensor_parallel_group_finishes_the_same(work, whole):
    def dies_in_the_third_batch():
        append, batches = journal.Part.append, iter(range(9))

        def dying(part, rows):
            if next(batches) == 2:
                os._exit(9)
            append(part, rows)

        journal.Part.append = dying
        return work("--tensor_parallel_size=2", "--batch_size=5", out="killed.jsonl")

    with pytest.raises(RuntimeError, match="failed"):
        run_ranks(2, dies_in_the_third_batch)
    (part,) = (work.folder / "killed.jsonl.state" / "parts").glob("*.part")
    assert 0 < len(part.read_bytes().splitlines()) < 48 and not (work.folder / "killed.jsonl").exists()
    assert run_ranks(2, lambda: work("--tensor_parallel_size=2", "--batch_size=9", out="killed.jsonl")) == [0, 0]
    assert work.read("killed.jsonl") == whole


def test_a_refusal_reaches_all_ranks_of_a_tensor_parallel_group(work, whole):
    assert run_ranks(2, lambda: work("--tensor_parallel_size=2", "--seed=4")) == [2, 2]
    said = run_ranks(3, lambda: (work("--tensor_parallel_size=3", out="three.jsonl"), work.said))
    assert [code for code, _ in said] == [2] * 3 and "model.num_heads" in said[0][1]
    assert not (work.folder / "three.jsonl").exists()


class _AnyText(str):
    def __eq__(self, other):
        return isinstance(other, str)


ANY_TEXT = _AnyText()


def test_a_refusal_reaches_all_ranks(work, whole):
    assert run_ranks(2, lambda: work("--seed=4")) == [2, 2]
    assert work.read() == whole


def test_tasks_of_an_array_make_it_together(work, whole, monkeypatch):
    for task in (5, 3, 7):
        for name, value in zip(("ID", "MIN", "MAX", "STEP", "COUNT"), (task, 3, 7, 2, 3)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert not (work.folder / "array.jsonl").exists()
        assert work(out="array.jsonl") == 0
    assert work.read("array.jsonl") == whole
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert work(out="gaps.jsonl") == 2 and "leaves out task numbers" in work.said


def test_parts_by_hand_and_a_merge(work, whole):
    assert work("--shard=1/3", out="parts.jsonl") == 0 and "results are there" in work.said
    assert work("--merge", out="parts.jsonl") == 2 and "run the parts that are missing" in work.said
    assert work("--overwrite", "--shard=1/3", out="parts.jsonl") == 2
    assert work(out="parts.jsonl") == 0 and "continuing: 12 of 48" in work.said  # all by one worker now
    assert work.read("parts.jsonl") == whole
    assert work("--merge", out="parts.jsonl") == 0
    assert work("--merge", out="never.jsonl") == 2 and "sample first" in work.said


def die_at(point: str, count: int, work) -> None:
    """In a child: run until the `count`-th time of `point`, then die as by SIGKILL."""
    torch.set_num_threads(1)
    seen = iter(range(count))

    def kill_when_due():
        if next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        def wrapper(*args):
            if point == "half a write":
                if len(args) == 2 and len(args[1]) > 40:
                    with contextlib.suppress(StopIteration):
                        next(seen)
                        return function(*args)
                    function(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)
            kill_when_due()
            return function(*args)

        return wrapper

    target = {"half a write": "write", "before a rename": "replace", "before a sync": "fsync"}[point]
    journal.os = types.SimpleNamespace(**{**vars(os), target: dying(getattr(os, target))})
    work("--batch_size=3")
    os._exit(0)


def in_child(function, *args) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    child.start()
    return child


# renames: errors, index, manifest, output, times, complete
POINTS = [("half a write", 0), ("half a write", 3), ("before a sync", 9)] + [("before a rename", n) for n in range(6)]


@pytest.mark.parametrize("point, count", POINTS)
def test_killed_where_it_hurts_it_finishes_without_duplicate_or_gap(work, calm_folder, point, count):
    child = in_child(die_at, point, count, work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert work("--batch_size=16") == 0
    assert work.read() == (calm_folder / "out.jsonl").read_bytes()
    assert {path.name for path in work.state.iterdir()} == {"complete.json", "index.npy", "locks", "manifest.json",
                                                           "merge.lock", "prepare.lock"}  # fmt: skip
    assert not list(work.folder.glob("*.tmp"))


def test_killed_at_ten_random_moments_it_finishes_the_same(work, whole):
    chance, kills = random.Random(5), 0
    for attempt in range(40):
        child = in_child(lambda: (torch.set_num_threads(1), work("--batch_size=1", out="killed.jsonl")))
        child.join(chance.uniform(0.0, 0.12))
        is_finished = child.exitcode is not None
        child.kill()
        child.join()
        kills += not is_finished
        if is_finished or kills == 10:
            break
    assert kills >= 3
    assert run_ranks(2, lambda: work(out="killed.jsonl")) == [0, 0]  # and goes on with other ranks
    assert work.read("killed.jsonl") == whole


def test_damage_to_a_part_costs_the_damaged_results_only(work, whole):
    assert work("--shard=0/2", out="hurt.jsonl") == 0
    part = next((work.folder / "hurt.jsonl.state" / "parts").iterdir())
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content + b"77 0123456789abcdef {}\nrubbish\n99")
    assert work(out="hurt.jsonl") == 0
    assert work.read("hurt.jsonl") == whole


def test_two_jobs_do_not_write_one_output(work):
    held = multiprocessing.get_context("fork").Event()

    def hold():
        work("--shard=0/2")
        with journal.worker_lock(journal.State(work.folder / "out.jsonl", 0, 2)):
            held.set()
            time.sleep(60)

    holder = in_child(hold)
    assert held.wait(60)
    assert work("--shard=0/2") == 2 and "being written by another job" in work.said
    assert work() == 2 and "being written by another job" in work.said
    assert work("--shard=1/2") == 0
    holder.kill()
    holder.join()
    assert work() == 0


def test_the_same_command_again_does_nothing(work, whole):
    before = (work.folder / "out.jsonl").stat().st_mtime_ns
    assert work() == 0 and "complete: 48 results; nothing to do" in work.said
    assert (work.folder / "out.jsonl").stat().st_mtime_ns == before
    assert work("--batch_size=3") == 0  # not one of the things that the text depends on


def test_another_command_is_refused_with_the_difference(work, whole, run_folder):
    for flags, difference in (
        (["--seed=4"], "settings.seed: 3 -> 4"),
        (["--temperature=0.5"], "settings.temperature: 1.0 -> 0.5"),
        (["--num_samples=1"], "settings.num_samples: 2 -> 1"),
        (["--num_threads=2"], "numerics.num_threads: 1 -> 2"),
    ):
        assert work(*flags) == 2 and difference in work.said, work.said
        torch.set_num_threads(1)
    write_prompts(work.folder / "in.jsonl", mixed_requests(23))
    assert work() == 2 and "input.size" in work.said and "input.xxh3_128" in work.said
    assert work.read() == whole
    assert work("--overwrite", "--num_samples=1") == 0
    assert [row["id"] for row in rows_of(work.read())] == [r["id"] for r in mixed_requests(23)]


def test_another_checkpoint_is_refused(work, whole, run_folder, monkeypatch):
    older = run_folder / "checkpoints" / "step_00000001"
    arguments = [str(older), f"--input={work.folder / 'in.jsonl'}", f"--output={work.folder / 'out.jsonl'}", *FLAGS]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert exit_code(lambda: run_command(COMMAND, arguments, "sample_batch")) == 2
    assert "checkpoint.step: 2 -> 1" in stderr.getvalue() and "checkpoint.manifest_xxh3_128" in stderr.getvalue()


def test_an_output_that_is_not_ours_or_no_longer_is_not_touched(work):
    (work.folder / "out.jsonl").write_text("precious\n")
    assert work() == 2 and "was not made by this command" in work.said
    assert work.read() == b"precious\n"
    assert work("--overwrite") == 0
    (work.folder / "out.jsonl").write_text("edited\n")
    assert work() == 2 and "changed or removed since" in work.said


BAD_LINES = [
    (b"not json", "not valid JSON"),
    (b'{"prompt": "x"}', "no id"),
    (b'{"id": "", "prompt": "x"}', "no id"),
    (b'{"id": true, "prompt": "x"}', "no id"),
    (b'{"id": 1.5, "prompt": "x"}', "no id"),
    (b'{"id": NaN, "prompt": "x"}', "NaN is not JSON"),
    (b'{"id": "a", "id": "b", "prompt": "x"}', "a key stands twice"),
    (b'["id"]', "not a JSON object"),
    (b'{"id": "p", "promt": "x"}', "did you mean prompt?"),
    (b'{"id": "p"}', "needs one of prompt, text, tokens, messages, has none"),
    (b'{"id": "p", "prompt": "x", "tokens": [1]}', "has prompt and tokens"),
    (b'{"id": "p", "prompt": 7}', "prompt is not a text"),
    (b'{"id": "p", "prompt": "\\ud800"}', ""),
    (b'{"id": "\\ud800", "prompt": "x"}', ""),
    (b'{"id": "p", "prompt": "XYZ"}', "character 'X'"),
    (b'{"id": "p", "prompt": "x", "max_new_tokens": 99}', "shorten by 84"),
    (b'{"id": "p", "prompt": "x", "max_new_tokens": 0}', "not a whole number from 1 on"),
    (b'{"id": "p", "prompt": "x", "max_new_tokens": 1e3}', "not a whole number from 1 on"),
    (b'{"id": "p", "text": "no hole"}', "needs a hole"),
    (b'{"id": "p", "text": "<mask>", "max_new_tokens": 3}', "goes with a prompt"),
    (b'{"id": "p", "text": "<mask:999999999>"}', "999999999 tokens"),
    (b'{"id": "p", "tokens": [30]}', "token 30 is not one of the 30"),
    (b'{"id": "p", "tokens": [-1]}', "token -1"),
    (b'{"id": "p", "tokens": [true]}', "not a list of whole numbers"),
    (b'{"id": "p", "tokens": [' + b"1" * 5000 + b"]}", ""),
    (b'{"id": "p", "tokens": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
    (b'{"id": "p", "prompt": "\xff"}', "utf-8"),
    (b'{"id": "0", "prompt": "x"}', "its id stands in line 1 already"),
]


def test_bad_lines_go_with_number_and_reason_to_a_side_file(work, monkeypatch):
    monkeypatch.setattr(prompt_file, "MAX_LINE_BYTES", 1 << 19)
    huge = b'{"id": "huge", "prompt": "' + b"x" * (1 << 20) + b'"}'
    lines = [b'{"id": 0, "prompt": "x"}', b"", *(line for line, _ in BAD_LINES), huge, b'{"id": "z", "prompt": "y"}']
    (work.folder / "in.jsonl").write_bytes(b"\n".join(lines))
    assert work() == 0 and f"{len(BAD_LINES) + 1} bad lines" in work.said
    assert [row["id"] for row in rows_of(work.read())] == [0, 0, "z", "z"]
    errors = rows_of(work.read("out.jsonl.errors.jsonl"))
    assert [error["line"] for error in errors] == list(range(3, len(BAD_LINES) + 4))
    for error, (line, reason) in zip(errors, BAD_LINES):
        assert reason in error["error"] and len(error["error"]) <= 500, (line[:60], error)
    assert errors[-1]["error"] == "longer than 0 MiB"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"rubbish\n"])
def test_an_input_without_a_good_line_is_refused(work, content):
    (work.folder / "in.jsonl").write_bytes(content)
    assert work() == 2 and "no good line" in work.said
    assert not (work.folder / "out.jsonl").exists()
    write_prompts(work.folder / "in.jsonl", mixed_requests(1))
    assert work() == 0 and len(rows_of(work.read())) == 2


def test_parquet_holds_the_same_rows(work, whole):
    import pyarrow.parquet

    assert work(out="out.parquet") == 0
    rows = pyarrow.parquet.read_table(work.folder / "out.parquet").to_pylist()
    assert rows == [row | {"id": str(row["id"])} for row in rows_of(whole)]
    assert work(out="again.parquet") == 0
    assert work.read("out.parquet") == work.read("again.parquet")


def test_text_ends_before_the_stop_token(work, whole):
    assert work("--stop_token=e", "--stop_token= ", out="cut.jsonl") == 0
    for cut, row, request in zip(rows_of(work.read("cut.jsonl")), rows_of(whole), np.repeat(mixed_requests(24), 2)):
        assert row["text"].startswith(cut["text"]) and cut["tokens"] == row["tokens"][: len(cut["tokens"])]
        given = request.get("prompt", "")
        assert "text" in request or "tokens" in request or not set(cut["text"][len(given) :]) & {"e", " "}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sampler=ancestrel"], "did you mean 'ancestral'"),
        (["--batch_size=-1"], "--batch_size must be between 0"),
        (["--shard=3/3"], "I from 0 to N - 1"),
        (["--shard=x"], "write I/N"),
        (["--tensor_parallel_size=2"], "--tensor_parallel_size 2 does not divide the 1 processes"),
        (["--stop_token=ab"], "'ab' is 2 tokens"),
        (["--outptu=x"], "did you mean --output"),
        (["--num_threads=0"], "--num_threads"),
        (["--block_size=4", "--cache=dual"], "kept keys would depend"),
    ],
)
def test_bad_flags_are_refused(work, flags, message):
    assert work(*flags) == 2 and message in work.said
    assert not (work.folder / "out.jsonl").exists()


def test_bad_paths_are_refused(work):
    assert work(out="no/such/out.jsonl") == 2 and "folder does not exist" in work.said
    assert work(prompts="none.jsonl") == 2 and "No such file" in work.said
    assert work(out="in.jsonl") == 2 and "it is the input" in work.said
    (work.folder / "folder").mkdir()
    assert work(out="folder") == 2 and "it is a folder" in work.said


def test_shares_are_a_partition_of_balanced_cost():
    chance = np.random.default_rng(0)
    lengths, num_open = chance.integers(1, 200, 3000), chance.integers(0, 64, 3000)
    steps = np.full(3000, 40)
    cost = np.repeat(lengths * np.minimum(steps, num_open) + 1.0, 2)
    for workers in (1, 2, 7):
        shares = [batching.share(lengths, steps, num_open, 2, w, workers) for w in range(workers)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(6000))
        loads = [cost[share].sum() for share in shares]
        assert max(loads) < 1.02 * min(loads)
    for batch in batching.batches(shares[0], lengths, steps, 2, 16):
        assert 1 <= len(batch) <= 16 and len(set(lengths[batch // 2])) == 1


def test_no_two_samples_share_random_numbers():
    addresses = {prompt_file.noise_address(f"prompt-{i}", s) for i in range(40_000) for s in range(2)}
    assert len(addresses) == 80_000
    assert len({low for low, _ in addresses}) < 80_000  # 32 bits alone do collide
    assert prompt_file.noise_address(7, 1) == prompt_file.noise_address("7", 1) != prompt_file.noise_address("71", 1)


def test_batch_sizes_follow_the_memory():
    assert batching.batch_size_for(8 << 30, 64, 67, 1.0) == 256
    assert batching.batch_size_for(8 << 30, 1024, 50257, 1.0) == 3
    assert batching.batch_size_for(0, 1024, 50257, 1.0) == 1


@pytest.mark.slow
def test_ten_thousand_prompts_of_mixed_lengths(work):
    write_prompts(work.folder / "in.jsonl", mixed_requests(10_000))
    assert work() == 0
    expected = [(request["id"], sample) for request in mixed_requests(10_000) for sample in range(2)]
    assert [(row["id"], row["sample"]) for row in rows_of(work.read())] == expected
    assert run_ranks(4, lambda: work("--batch_size=7", out="ranks.jsonl"), seconds=600) == [0] * 4
    assert work.read("ranks.jsonl") == work.read()
