"""The seeds' methods on tinyshakespeare at equal compute, over some seeds: likelihood and samples of each.

    dlm prepare tinyshakespeare.txt --tokenizer char --special_tokens '<|delete|>,<|gap|>' --out data/seeds
    python benchmarks/benchmark_seeds.py --data data/seeds [--json] [--only NAMES] [--seeds 1,2,3] [--steps 300]

All are `configs/shakespeare_char_tiny.yaml` made smaller by SIZE. Equal compute: each trains for so many steps that they
cost the passes of the trunk that `base` takes in --steps steps, a forward pass counted 1 and a backward pass 2. Then the bound
on validation (nats/character; of `autoregressive` exact), and texts by each sampler in so many steps at most: nats/character under the
built-in n-gram of the training text (lower is likelier), unigram entropy (lower is duller), and passes. Means and standard
deviations over the seeds. What a judge's scorer cost is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, machine, report

CONFIG = "configs/shakespeare_char_tiny.yaml"
SIZE = ("model.num_layers=3", "model.hidden_size=96", "model.num_heads=3", "model.ffn_size=256", "model.seq_len=96",
        "train.global_batch_size=16", "train.micro_batch_size=16", "optimizer.warmup_steps=50")  # fmt: skip
NUM_TEXTS = 32


class Method(NamedTuple):
    """Overrides of a run; samplers of its texts, each `name steps`; passes of a step (forward 1, backward 2)."""

    overrides: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ("ancestral 16",)
    passes: float = 3.0
    has_likelihood: bool = True


CRITIC = ("model.critic=true", "objective.critic_alpha=0.5")
METHODS = {
    "base": Method((), ("ancestral 16", "ancestral 64", "remdm_conf 32")),
    "edit": Method(("diffusion.edit_stage_start=0.5", "diffusion.deletion_corruption=true"),
                   ("ancestral 64", "edit 64", "edit_gated 64")),
    "critic": Method((*CRITIC, "objective.critic_start={quarter}", "objective.critic_end={half}"), ("ancestral 16", "critic 8", "critic 32"), 6.0),
    "critic_weighting": Method((*CRITIC, "objective.critic_weighting=true"), passes=7.0),
    "sampler_head": Method(("model.sampler_head=true", "objective.sampler_alpha=0.5"), ("ancestral 16", "local_waves 16")),
    "label_smoothing": Method(("objective.label_smoothing=0.1",)),
    "mask_ratio": Method(("objective.mask_ratio_power=0.5", "diffusion.weighting=simple")),
    "simple": Method(("diffusion.weighting=simple",)),
    "entropy": Method(("objective.entropy_threshold=0.2",)),
    "scorer": Method(("model.score=true", "objective.kind=sequence_scoring"), (), has_likelihood=False),
    "judge": Method(("objective.judge={scorer}",), passes=4.0),
    "gaussian": Method(("objective.kind=gaussian", "model.time_conditioning=adaln"), ("ddpm 64", "ddim 64"), 3.5),  # half of the rows are looked at before, without gradients
    "autoregressive": Method(("objective.kind=autoregressive",), ("left_to_right",)),
}  # fmt: skip


def dlm(*words: str) -> str:
    """What a command prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "dlm_scale.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dlm {' '.join(words)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def train(name: str, out: Path, steps: int, seed: int, data: str) -> None:
    """The run `out`."""
    places = {"scorer": out.parent / f"scorer_{seed}", "quarter": steps // 4, "half": steps // 2}
    words = [word.format(**places) for word in METHODS[name].overrides]
    dlm("train", CONFIG, f"data.train={data}/train", f"data.validation={data}/val", f"train.out={out}", f"train.seed={seed}",
               f"train.num_steps={steps}", "train.eval_every=0", "train.save_every=0", "train.eval_rows=2", "train.log_every=100",
               "train.device=cpu", *SIZE, *words)  # fmt: skip


def measure(name: str, run: Path, data: str, seed: int) -> dict[str, float]:
    """The bound and the texts' statistics, by their place in the table."""
    found = {}
    if METHODS[name].has_likelihood:
        made = json.loads(dlm("evaluate", str(run), "--data", f"{data}/val", "--json", "--device=cpu", "--max_rows=256").splitlines()[-1])
        found["nelbo"] = made["nelbo"]
    for asked in METHODS[name].samplers:
        sampler, *steps = asked.split()
        flags = [f"--sampler={sampler}", *(f"--steps={number}" for number in steps)]
        made = json.loads(dlm("evaluate", str(run), "--data", f"{data}/val", f"--generate={NUM_TEXTS}", f"--seed={seed}", "--json",
                              "--device=cpu", "--length=96", *flags).splitlines()[-1])  # fmt: skip
        found |= {f"{asked}: {key}": made[key] for key in ("judge_nll", "unigram_entropy", "nfe") if key in made}
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, help="folder of the dataset")
    parser.add_argument("--only", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=300, help="of base")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: nowhere")
    args = parser.parse_args()
    names, seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        about = {"steps_of_base": args.steps, "seeds": seeds, "texts": NUM_TEXTS}
        report(machine() | about | all_methods(names, seeds, folder, args.data, args.steps), args.json)


def all_methods(names: list[str], seeds: list[int], folder: Path, data: str, base_steps: int) -> dict[str, Any]:
    """By method: steps, and [mean, standard deviation] of each figure."""
    results = {}
    for name in names:
        steps, values = round(base_steps * METHODS["base"].passes / METHODS[name].passes), {}
        for seed in seeds:
            run = folder / f"{name}_{seed}"
            train(name, run, steps, seed, data)
            for key, value in measure(name, run, data, seed).items():
                values.setdefault(key, []).append(value)
        results[name] = {"steps": steps} | {
            key: [statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None]
            for key, found in values.items()}  # fmt: skip
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    main()
