"""The fault campaign: `python -m tests.faults.report [ROW ...] [--write docs/reliability.md]`.

Without names all rows, in an hour or so on two cores; `ROW:COUNT` runs as many cases. Prints a row as it is done; `--write`
puts it into the table of the document, where rows that are not run stay as they are. Exit code 1 where a case failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.figures import Figure

START, END, NOT_YET = "<!-- figures: start -->", "<!-- figures: end -->", "not yet"


@dataclass(frozen=True)
class Row:
    """`run(folder, count)` gives the figure; `unit` says what its cases are."""

    fault: str
    unit: str
    count: int
    run: Callable[[Path, int], Figure]


def _saves(faults: tuple[str, ...], asynchronous: bool) -> Callable[[Path, int], Figure]:
    def run(folder: Path, count: int) -> Figure:
        from tests.faults.file_operations import ALL_CASES, campaign

        total = Figure(0)
        for number, case in enumerate([case for case in ALL_CASES if case.asynchronous == asynchronous][:count]):
            (folder / str(number)).mkdir()
            for found in campaign(case, folder / str(number), faults).values():
                total += Figure(found.total, found.failures)
        return total

    return run


def _mutations(name: str) -> Callable[[Path, int], Figure]:
    def run(folder: Path, count: int) -> Figure:
        from tests.faults import mutations
        from tests.faults.specimen import make_specimen

        return getattr(mutations, name)(make_specimen(folder), count)

    return run


def _payloads(folder: Path, count: int) -> Figure:
    from tests.faults.payloads import payloads

    return payloads(folder)


def _headers(folder: Path, count: int) -> Figure:
    from tests.faults.headers import headers

    return headers(folder, count)


def _training(name: str, width: int = 128) -> Callable[[Path, int], Figure]:
    def run(folder: Path, count: int) -> Figure:
        from tests.faults.rows import training_rows

        return training_rows(folder, width=width, **{name: count})[name]

    return run


def _worlds(folder: Path, count: int) -> Figure:
    from tests.faults.worlds import LAYOUTS, world_changes

    return world_changes(folder, LAYOUTS[:count])


KINDS_OF_SAVE = "operations of a save, by 1 and 2 ranks, after and in place of the one before"
ROWS: dict[str, Row] = {
    "kill": Row("SIGKILL at every file operation of a save; its deletions included", KINDS_OF_SAVE, 4,
                _saves(("KILL",), False)),
    "kill-async": Row("the same, written by a thread while the tensors change", KINDS_OF_SAVE, 4, _saves(("KILL",), True)),
    "errors": Row("ENOSPC from, and EIO at, every file operation of a save", KINDS_OF_SAVE, 4,
                  _saves(("ENOSPC", "EIO"), False)),
    "errors-async": Row("the same, written by a thread", KINDS_OF_SAVE, 4, _saves(("ENOSPC", "EIO"), True)),
    "power": Row("everything since the last fsync lost, or any part of it", "moments in three saves x five worlds", 4,
                 _saves(("POWER",), False)),
    "power-async": Row("the same, written by a thread", "moments in three saves x five worlds", 4,
                       _saves(("POWER",), True)),
    "damage": Row("truncations, bit flips, zero pages, missing, swapped and longer files of a checkpoint",
                  "random damages: found before use, file named, older one taken", 1000,
                  _mutations("checkpoint_mutations")),
    "damage-data": Row("the same in the files of a dataset", "random damages: found on opening, or by `dlm data verify`",
                       1000, _mutations("dataset_mutations")),
    "payloads": Row("code in .pt, .bin, DeepSpeed's files, YAML, JSON, tokenizers, dataset caches; pipes, links, bombs",
                    "kinds of file: none executed, none but refused or ignored", 1, _payloads),
    "headers": Row("hostile headers of safetensors and .idx, manifests, documents",
                   "generated: refused or harmless, nothing read outside, time and memory bounded", 10_000, _headers),
    "killed": Row("kill -9 of a rank in data, forward, backward, step, save",
                  "runs of 2 ranks: all lines of metrics.jsonl, 20 and more of them after the fault, and the weights "
                  "bit-equal to the undisturbed run", 40, _training("kills")),
    "signals": Row("SIGTERM, SIGINT, SIGUSR1, SIGUSR2 at a random moment, to one rank or both, once or twice",
                   "stops with a checkpoint, continued to the same weights", 50, _training("signals")),
    "disk": Row("disk full for a while, or failing once, at a random operation of the saves of a run",
                "runs that went on and ended with the same weights", 20, _training("full_disk")),
    "hangs": Row("a rank stopped (SIGSTOP), or asleep in data, forward, save", "named within the timeout + 5 s", 8,
                 _training("hangs")),
    "worlds": Row("TP {1,2} x DP {1,2,4} x ZeRO {0,1,2,3} from the canonical layout and back",
                  "4 stages of so many layouts: same batches and weights, losses within 1e-5", 6, _worlds),
    "soak": Row("`tools/chaos.py`: a random fault about every 20 steps, 2 ranks", "soaks that ended with the weights and "
                "losses of the calm run", 2000, _training("soak", 32)),
    "stall": Row("how long training waits for an asynchronous save, against a synchronous one", "at most 0.1 of it", 8,
                 _training("stall")),
}


def line(name: str, figure: Figure | None, count: int, seconds: float = 0.0) -> str:
    row = ROWS[name]
    notes = "; ".join(f"{key} {value}" for key, value in figure.notes) if figure else ""
    steps = f" of {count} steps" if name == "soak" else f" ({count} saves)" if name == "stall" else ""
    told = f"{row.unit}{steps}{': ' + notes if notes else ''} ({seconds:.0f} s)" if figure else row.unit
    return f"| {row.fault} | {f'**{figure}**' if figure else NOT_YET} | {told} | `{name}` |"


def write_into(document: Path, lines: dict[str, str]) -> None:
    """Replace the lines of these rows in the document's table; it gets those that it lacks, not measured."""
    before, rest = document.read_text().split(START)
    table, after = rest.split(END)
    present = {match[1]: text for text in table.splitlines() if (match := re.search(r"\| `([\w-]+)` \|$", text))}
    body = [lines.get(name) or present.get(name) or line(name, None, 0) for name in ROWS]
    head = ["| fault | figure | cases | row |", "|---|---|---|---|"]
    document.write_text(f"{before}{START}\n" + "\n".join(head + body) + f"\n{END}{after}")


def measure(name: str, count: int) -> tuple[Figure, str]:
    folder, started = Path(tempfile.mkdtemp(prefix=f"faults-{name}-")), time.monotonic()
    try:
        figure = ROWS[name].run(folder, count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return figure, line(name, figure, count, time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW[:COUNT]", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments, has_failed = parser.parse_args(), False
    for item in arguments.rows or ROWS:
        name, _, count = item.partition(":")
        figure, text = measure(name, int(count or ROWS[name].count))
        print(text, flush=True)
        for failure in figure.failures[:20]:
            print(f"    {failure}", file=sys.stderr, flush=True)
        has_failed |= bool(figure.failures)
        if arguments.write:
            write_into(arguments.write, {name: text})
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
