"""The model card of an export: what the run measured, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dlm_scale.convert.source import Model
from dlm_scale.model.parameters import count_parameters

USE = """```python
from transformers import pipeline

pipe = pipeline("text-diffusion", model=FOLDER, trust_remote_code=True)
print(pipe("Once upon a time", num_steps=64)["decoded_texts"][0])
for text in pipe.stream_generation("Once upon a time", num_steps=64):
    print(text)
```

`trust_remote_code` loads the Python files of this folder; they need `torch` and `transformers` alone."""


def model_card(model: Model, slot: str) -> bytes:
    """README.md. Figures come from the run's own metrics where the checkpoint lies in its run folder."""
    shape, count = model.shape, count_parameters(model.shape, model.meta.vocabulary)
    rows = [
        ("parameters", f"{count:,}"),
        ("layers x width x heads", f"{shape.num_layers} x {shape.hidden_size} x {shape.num_heads}"),
        ("context", f"{shape.seq_len} tokens"),
        (
            "vocabulary",
            f"{model.meta.vocab_size} ids ({model.meta.tokenizer.kind} tokenizer), mask {model.meta.mask_id}",
        ),
        ("weights", "moving average (EMA)" if slot == "ema" else "as trained"),
        *_training(model),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    head = "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags:\n- text-diffusion\n- dlm_scale\n---\n"
    text = (
        f"{head}\n# A masked diffusion language model\n\nIt fills in masked tokens at any mask ratio, sees both sides, "
        "and writes by filling a row of masks. Made with dlm_scale.\n\n"
        f"{table}\n\n{_figures(model)}\n\n## Use\n\n{USE}\n"
    )
    return text.encode()


def _training(model: Model) -> list[tuple[str, str]]:
    state = json.loads(model.documents["state.json"])
    if not state.get("step"):
        return []
    diffusion = model.config.diffusion
    return [("steps, tokens seen", f"{state['step']:,}, {state.get('tokens', 0):,}"),
            ("objective", f"schedule {diffusion.schedule}, weighting {diffusion.weighting}"),
            ("data", ", ".join(source.path for source in model.config.data.train))]  # fmt: skip


def _figures(model: Model) -> str:
    found = last_evaluation(model)
    if found is None:
        return "No evaluation of this checkpoint is on record."
    nelbo, error = found["val_nelbo"], found.get("val_nelbo_se") or 0.0
    return (
        f"Validation NELBO <= {nelbo:.4f} nats a token (standard error {error:.4f}), perplexity <= {math.exp(nelbo):.3f}, "
        f"at step {found['step']} of its run: an upper bound of the negative log-likelihood, by Monte Carlo."
    )


def last_evaluation(model: Model) -> dict[str, Any] | None:
    """The run's last evaluation up to this checkpoint."""
    metrics = Path(model.path).parent.parent / "metrics.jsonl"
    step, found = json.loads(model.documents["state.json"]).get("step", 0), None
    if model.family == "checkpoint" and metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line being written
            if record.get("val_nelbo") is not None and record["step"] <= step:
                found = record
    return found
