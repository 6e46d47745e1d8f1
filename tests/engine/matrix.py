"""The whole matrix of layouts against one plain-torch process: `python -m tests.engine.matrix [--write FILE]`.

Needs four processes at a time and a few minutes. Prints a Markdown table; `--write` puts it between the two marks of
FILE (docs/parallel.md). Exit code 1 where a cell lies beyond the tolerance or a batch hash differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

from tests.engine.cases import MODELS, Case, differences, import_distributed, run_cases, twins
from tests.forked import run_ranks

STEPS, TOLERANCE, SECONDS = 10, 1e-5, 1200.0
LAYOUTS = ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1))  # (tensor, data)
START, END = "<!-- matrix: start -->", "<!-- matrix: end -->"


def all_cases() -> list[Case]:
    """Every stage, layout, accumulation and sequence parallelism of the base model; every variant at stages 1 and 3."""
    cases = []
    for (tensor, data), stage in itertools.product(LAYOUTS, range(4)):
        sequences = (False, True) if tensor > 1 else (False,)
        cases += [Case(stage, tensor, data, *rest) for rest in itertools.product((1, 2), sequences)]
        if stage in (1, 3):
            cases += [Case(stage, tensor, data, 1, sequences[-1], model) for model in MODELS if model != "base"]
    return cases


def run_all(cases: list[Case]) -> dict[Case, dict[str, float]]:
    """Differences of each case from its twin; one process group a layout, one layout at a time."""
    import_distributed()
    twin, found = twins(cases, STEPS), {}
    for tensor, data in LAYOUTS:
        mine = [case for case in cases if (case.tensor, case.data) == (tensor, data)]
        started = time.monotonic()
        results = run_ranks(tensor * data, run_cases, mine, STEPS, seconds=SECONDS)[0]
        found |= {case: differences(run, twin[case.model]) for case, run in results.items()}
        print(f"TP{tensor}xDP{data}: {len(mine)} runs in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def cell(found: dict[str, float]) -> str:
    return " ".join(f"{found[name]:.0e}".replace("e-0", "e-") for name in ("loss", "grad_norm", "weights"))


def table(found: dict[Case, dict[str, float]]) -> str:
    """A row a layout, batch split and model; a column a ZeRO stage."""
    rows: dict[tuple, dict[int, str]] = {}
    for case, differs in found.items():
        rows.setdefault((case.layout, case.accumulation, case.model), {})[case.stage] = cell(differs)
    lines = ["| layout | accumulation | model | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(map(str, key))} | {' | '.join(row.get(stage, '') for stage in range(4))} |"
              for key, row in rows.items()]
    return "\n".join(lines)


def summary(found: dict[Case, dict[str, float]]) -> str:
    worst = {name: max(differs[name] for differs in found.values()) for name in ("loss", "grad_norm", "weights")}
    hashes = sum(differs["hashes"] for differs in found.values())
    return (f"{len(found)} runs of {STEPS} steps; each cell: largest difference of loss (absolute), gradient norm "
            f"(relative) and weights (absolute). Largest of all: loss {worst['loss']:.1e}, norm "
            f"{worst['grad_norm']:.1e}, weights {worst['weights']:.1e}; unequal batch hashes: {hashes}.")


def write_between_marks(path: Path, text: str) -> None:
    before, rest = path.read_text().split(START)
    path.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = run_all(all_cases())
    text = f"{summary(found)}\n\n{table(found)}"
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, text)
    return int(any(d["hashes"] or max(d["loss"], d["grad_norm"], d["weights"]) > TOLERANCE for d in found.values()))


if __name__ == "__main__":
    sys.exit(main())
