"""Whether the length of an answer follows the question: conversations whose answers have 1 to 60 characters.

    python benchmarks/benchmark_sft.py [--json] [--policies none random full] [--steps 800] [--seed 1] [--folder DIR]

A question such as `r07x` asks for x seven times, `a07x` for x and X in turns, seven in all. A tenth of the 3120
questions is held out. For each value of data.answer_padding a model of its own is trained from scratch on the
others, on one CPU thread, and answers the held-out questions at temperature 0: whole canvases and blocks of 16, with
canvases of 61 (the longest answer and its end), 71, and the very length of each true answer. What stands before the
first end token is the answer; without one, all of the canvas. A canvas that is all answer gives r = null.
"""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import ROOT, arguments, machine, report
from dlm_scale.config_text import dump_yaml
from dlm_scale.data.indexed import IndexedDataset
from dlm_scale.data.loader import open_split, read_past
from dlm_scale.data.prepare import prepare
from dlm_scale.inference import load_for_inference
from dlm_scale.sampling import generate

LONGEST, SEQ_LEN, BLOCK, ROWS = 60, 80, 16, 32
MODEL = {"num_layers": 3, "hidden_size": 64, "num_heads": 2, "seq_len": SEQ_LEN, "position": "learned"}
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>a{% endif %}"""  # shorter rows than chatml's
CANVASES = {"61": LONGEST + 1, "71": SEQ_LEN - 9, "exact": None}
DECODINGS = {"whole": {"block_size": None, "passes": 16}, "blocks": {"block_size": BLOCK, "passes": 32}}


def answer_to(question: str) -> str:
    kind, count, letter = question[0], int(question[1:3]), question[3]
    return letter * count if kind == "r" else (letter + letter.upper()) * (count // 2) + letter * (count % 2)


def write_conversations(path: Path) -> None:
    """All questions, one conversation a line."""
    with open(path, "w") as file:
        for question in (f"{kind}{count:02d}{letter}" for kind in "ra" for count in range(1, LONGEST + 1)
                         for letter in string.ascii_lowercase):  # fmt: skip
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer_to(question)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def train(folder: Path, policy: str, steps: int, seed: int) -> float:
    """CPU seconds of a run of `dlm train` into folder/policy."""
    config = {
        "model": MODEL,
        "data": {"train": f"{folder}/data/train", "validation": f"{folder}/data/val", "answer_padding": policy},
        "train": {"global_batch_size": ROWS, "micro_batch_size": ROWS, "num_steps": steps, "precision": "fp32",
                  "out": f"{folder}/{policy}", "seed": seed, "log_every": 50, "eval_every": 0, "save_every": 0,
                  "eval_rows": 64, "ema_decay": 0.98, "device": "cpu"},
        "optimizer": {"name": "muon", "learning_rate": 3e-3, "muon_learning_rate": 0.02, "warmup_steps": 50,
                      "min_learning_rate_ratio": 0.0},
    }  # fmt: skip
    path = folder / f"{policy}.yaml"
    path.write_text(dump_yaml(config))
    before = os.times()
    subprocess.run([sys.executable, "-m", "dlm_scale.train", str(path)], cwd=ROOT, check=True, stdout=sys.stderr,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def held_out(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(past, answer with its end), ids, of each held-out question."""
    meta, _, data = open_split(folder / "data" / "val")
    past_D = read_past(data, meta)
    documents = [data.document(i) for i in range(data.num_documents)]
    return [(ids[:past], ids[past:]) for ids, past in zip(documents, past_D.tolist(), strict=True)]


def answers(inference, questions: list, canvas: int | None, decoding: dict, end_id: int) -> list[np.ndarray]:
    """What the model says to each question, up to its first end token, in batches of one length."""
    sizes = [len(past) + (canvas or len(answer)) for past, answer in questions]
    said: list = [None] * len(questions)
    for size in sorted(set(sizes)):
        at = [i for i, own in enumerate(sizes) if own == size]
        x_BL = torch.full((len(at), size), inference.vocabulary.mask_id)
        for row, i in enumerate(at):
            x_BL[row, : len(questions[i][0])] = torch.from_numpy(questions[i][0].astype(np.int64))
        is_fixed_BL = x_BL != inference.vocabulary.mask_id
        num_open = int((~is_fixed_BL).sum(1).max())
        made = generate(
            inference.predict, x_BL, is_fixed_BL, sampler="low_confidence", num_steps=min(decoding["passes"], num_open),
            seed=0, temperature=0.0, mask_id=inference.vocabulary.mask_id, stop_ids=[end_id],
            request_hashes=at, block_size=decoding["block_size"], sample_indices=[0] * len(at),
            context=None if decoding["block_size"] is None else inference.seq_len,
        )  # fmt: skip
        for i, ids in zip(at, made.ids_BL.numpy(), strict=True):
            new = ids[len(questions[i][0]) :]
            ends = np.flatnonzero(new == end_id)
            said[i] = new[: ends[0]] if ends.size else new
    return said


def scores(questions: list, said: list[np.ndarray]) -> dict[str, float | None]:
    """Share of exact answers and of right lengths; correlation of the lengths, None where all are one."""
    true = [answer[:-1] for _, answer in questions]
    length = np.array([[len(a), len(b)] for a, b in zip(true, said, strict=True)], dtype=float)
    is_constant = np.ptp(length[:, 1]) == 0
    return {
        "exact": float(np.mean([np.array_equal(a, b) for a, b in zip(true, said, strict=True)])),
        "right_length": float(np.mean(length[:, 0] == length[:, 1])),
        "r": None if is_constant else float(np.corrcoef(length.T)[0, 1]),
    }


def measure(folder: Path, policy: str, steps: int, seed: int) -> dict[str, object]:
    seconds = train(folder, policy, steps, seed)
    questions, meta = held_out(folder), open_split(folder / "data" / "val")[0]
    inference = load_for_inference(folder / policy, device="cpu")
    lines = [json.loads(line) for line in (folder / policy / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {"train_cpu_seconds": seconds}
    found["val_nelbo"] = [line["val_nelbo"] for line in lines if "val_nelbo" in line][-1]
    for name, decoding in DECODINGS.items():
        for size, canvas in CANVASES.items():
            said = answers(inference, questions, canvas, decoding, meta.end_id)
            found[f"{name}_{size}"] = scores(questions, said)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policies", nargs="+", default=["none", "random", "full"])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where data and runs are kept; default: nowhere")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), "model": MODEL, "steps": args.steps, "rows": ROWS, "seed": args.seed}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        write_conversations(folder / "questions.jsonl")
        (folder / "template.jinja").write_text(TEMPLATE)
        if not (folder / "data").exists():
            prepare(str(folder / "questions.jsonl"), "char", folder / "data", text_key="messages", chat=str(folder / "template.jinja"), workers=1)
        for policy in args.policies:
            results[policy] = measure(folder, policy, args.steps, args.seed)
            print(policy, json.dumps(results[policy]), file=sys.stderr)
    report(results, args.json)


if __name__ == "__main__":
    main()
