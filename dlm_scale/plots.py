"""Pictures: the training curves of a run, and sweeps over samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Training NELBO (and its running mean), validation NELBO with its 95 % interval, and CE over the mask ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_nelbo(left, records)
    _draw_mask_ratio(right, records)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(path)


def _draw_nelbo(axes, records) -> None:
    steps = [r for r in records if r.get("nelbo") is not None]
    evaluations = [r for r in records if r.get("val_nelbo") is not None]
    if steps:
        axes.plot([r["step"] for r in steps], [r["nelbo"] for r in steps], lw=0.8, alpha=0.6, label="training estimate")
    if evaluations:
        width = [1.96 * (r["val_nelbo_se"] or 0.0) for r in evaluations]
        axes.errorbar([r["step"] for r in evaluations], [r["val_nelbo"] for r in evaluations], yerr=width, marker="o",
                      ms=4, capsize=3, label="validation, 95 % interval")
    axes.set(xlabel="step", ylabel="NELBO, nats per token (upper bound)", title="Negative ELBO")
    if steps or evaluations:
        axes.legend()
    axes.grid(alpha=0.3)


def _draw_mask_ratio(axes, records) -> None:
    curves = [r for r in records if any(r.get("val_ce_by_mask_ratio") or ())]
    middle = len(curves) // 2
    shown = {r["step"]: r for r in curves[:1] + curves[middle : middle + 1] + curves[-1:]}
    for record in shown.values():
        ratio = [(i + 0.5) / 10 for i in range(10)]
        points = [(m, ce) for m, ce in zip(ratio, record["val_ce_by_mask_ratio"]) if ce is not None]
        axes.plot(*zip(*points), marker=".", label=f"step {record['step']}")
    axes.set(xlabel="mask ratio", ylabel="cross-entropy of a masked token, nats", title="Validation CE by mask ratio")
    if curves:
        axes.legend()
    axes.grid(alpha=0.3)


def draw_sweep(points: list[dict[str, Any]], reference: dict[str, Any] | None, path: Path) -> None:
    """Judge's NLL and unigram entropy over the passes a sample, a line a sampler; held-out text as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"judge_nll": "judge's NLL, nats per token (lower is likelier)", "unigram_entropy":
              "unigram entropy, nats (lower repeats more)", "repetition_4": "share of repeated 4-grams"}
    figure, all_axes = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axes, (key, label) in zip(all_axes, panels.items()):
        for sampler in dict.fromkeys(point["sampler"] for point in points):
            line = [(p["nfe"], p[key]) for p in points if p["sampler"] == sampler and p[key] is not None]
            if line:
                axes.plot(*zip(*line), marker="o", ms=4, label=sampler)
        if reference is not None and reference[key] is not None:
            axes.axhline(reference[key], ls="--", color="grey", label="held-out text")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="passes a sample (NFE)", ylabel=label)
        axes.grid(alpha=0.3)
    all_axes[0].legend()
    _save(figure, path)
