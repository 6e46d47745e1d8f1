"""Quality of generated text: a judge's score, always beside entropy, distinct n-grams and repetition; and sweeps.

A judge alone rewards repetition, and entropy alone rewards noise: only the pair says something, and the same figures of
held-out text say what to compare it with.
"""

from __future__ import annotations

import json
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlm_scale.data.files import parse_json
from dlm_scale.engine.evaluation import gather_parts
from dlm_scale.errors import UsageError
from dlm_scale.evaluation.judges import Judge, Sample, judged
from dlm_scale.evaluation.text_statistics import variety
from dlm_scale.parallel.mesh import Mesh
from dlm_scale.sampling.engine import Generated, generate
from dlm_scale.sampling.samplers import GAUSSIAN_SAMPLERS, LEFT_TO_RIGHT
from dlm_scale.sampling.settings import edit_settings
from dlm_scale.sampling.texts import states


@dataclass(frozen=True)
class SamplingOptions:
    """What is generated: num_samples rows of `length` tokens from nothing. steps: most passes (0: one a token)."""

    sampler: str
    steps: int
    num_samples: int
    length: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16


def make_samples(inference: Any, options: SamplingOptions, mesh: Mesh = Mesh()) -> list[Sample]:
    """Samples as `dlm sample` with an empty prompt would draw them; the text does not depend on the batch size.

    Whole batches are dealt out to the data-parallel ranks, and all ranks get all samples. Collective.
    """
    firsts = range(0, options.num_samples, options.batch_size)
    mine = [(first, _batch(inference, options, first)) for first in firsts[mesh.data_rank :: mesh.data_size]]
    return [sample for _, batch in sorted(gather_parts(mine, mesh), key=lambda part: part[0]) for sample in batch]


def _batch(inference: Any, options: SamplingOptions, first: int) -> list[Sample]:
    index_B = range(first, min(first + options.batch_size, options.num_samples))
    x_BL = torch.full((len(index_B), options.length), inference.vocabulary.mask_id, device=inference.device)
    is_fixed_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    made = fill(inference, x_BL, is_fixed_BL, options.sampler, options.steps, seed=options.seed,
                request_hashes=[zlib.crc32(b"")] * len(index_B), sample_indices=index_B,
                temperature=options.temperature, top_p=options.top_p)  # fmt: skip
    rows = zip(made.ids_BL.tolist(), made.nfe_B.tolist())
    return [Sample(inference.tokenizer.decode(ids), ids, nfe) for ids, nfe in rows]


def fill(
    inference: Any, x_BL: torch.Tensor, is_fixed_BL: torch.Tensor, sampler: str, steps: int, **settings
) -> Generated:
    """`generate` for checkpoints of either kind; steps 0: one for each open position. From left to right it is always
    one, and what stands behind a position is never looked at.

    Raises UsageError for a sampler of the other kind.
    """
    if inference.is_autoregressive != (sampler == LEFT_TO_RIGHT):
        raise UsageError(f"sampler {sampler!r}: {inference.checkpoint.path} is "
                         f"{'' if inference.is_autoregressive else 'not '}autoregressive, and {LEFT_TO_RIGHT!r} is the "
                         "sampler of those that are, and of no other")
    if inference.is_gaussian != (sampler in GAUSSIAN_SAMPLERS):
        raise UsageError(f"sampler {sampler!r} does not fit {inference.checkpoint.path}, which is {inference.kind}: of "
                         f"Gaussian checkpoints take {' or '.join(GAUSSIAN_SAMPLERS)}, and of no others")
    if inference.is_gaussian:
        if settings.get("top_p", 1.0) != 1.0:
            raise UsageError(f"--top_p has no meaning for {inference.checkpoint.path}, which is gaussian: leave it out")
        passes = steps or inference.default_num_steps
        *_, last = states(inference, x_BL, is_fixed_BL, sampler=sampler, num_steps=passes, **settings)
        return Generated(last.x_BL, last.nfe_B)
    settings |= edit_settings(sampler, False, inference)
    steps = 0 if sampler == LEFT_TO_RIGHT else steps
    return generate(inference.predict, x_BL, is_fixed_BL, sampler=sampler, mask_id=inference.vocabulary.mask_id,
                    num_steps=steps or max(1, int((~is_fixed_BL).sum(1).max())), **settings)


def read_samples(path: str, tokenizer: Any) -> list[Sample]:
    """The samples of a JSON Lines file with `text`, `tokens` and `nfe`, as sampling writes it; tokens may be absent.

    Raises UsageError, with the line's number, for a line that is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--samples={path}: {error}") from error
    lines = [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    samples = [_sample(parse_json(line.encode(), f"{where}:", "not a line of JSON"), where, tokenizer)
               for where, line in lines]
    if not samples:
        raise UsageError(f"--samples={path}: no sample in it")
    return samples


def _sample(line: Any, where: str, tokenizer: Any) -> Sample:
    if not isinstance(line, dict) or not isinstance(line.get("text"), str):
        raise UsageError(f'{where}: expected an object with a `text`, as in {{"id": 0, "text": "...", "tokens": [1]}}')
    tokens = line.get("tokens")
    tokens = tokenizer.encode(line["text"]).tolist() if tokens is None else tokens
    size = tokenizer.vocabulary.size
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < size for token in tokens):
        raise UsageError(f"{where}: `tokens` must be ids below {size}, those of this checkpoint's tokenizer")
    return Sample(line["text"], tokens, line.get("nfe") if isinstance(line.get("nfe"), int) else None)


def text_report(samples: Sequence[Sample], judge: Judge) -> dict[str, Any]:
    """The judge's figures, the variety of the tokens, how many samples, and their mean passes."""
    passes = [sample.nfe for sample in samples if sample.nfe is not None]
    return {
        **judged(judge, samples),
        **variety([sample.tokens for sample in samples]),
        "samples": len(samples),
        "nfe": statistics.fmean(passes) if passes else None,
    }


def reference_samples(data: Any, tokenizer: Any, num_rows: int) -> list[Sample]:
    """Rows of held-out text as if they were samples."""
    rows = data.rows(np.arange(min(num_rows, data.num_rows)))
    if not isinstance(rows, np.ndarray):
        raise UsageError(f"{data.prefix} holds conversations: give text to compare with")
    return [Sample(tokenizer.decode(row), row.tolist()) for row in rows]


def sweep(inference: Any, judge: Judge, samplers: Sequence[str], steps: Sequence[int], options: SamplingOptions,
          say: Callable[[str], None], mesh: Mesh = Mesh()) -> Iterator[dict[str, Any]]:
    """One report for each sampler and number of steps, in that order. Collective."""
    for sampler in samplers:
        for num_steps in steps:
            samples = make_samples(inference, replace(options, sampler=sampler, steps=num_steps), mesh)
            report = {"sampler": sampler, "steps": num_steps} | text_report(samples, judge)
            say(text_line(report))
            yield report


def text_line(report: dict[str, Any]) -> str:
    """One report, to read."""
    name = f"{report['sampler']:<16} {report['steps']:>5} steps " if "sampler" in report else ""
    nfe = f"{report['nfe']:.1f} passes, " if report["nfe"] is not None else ""
    shown = {key: "-" if report[key] is None else f"{report[key]:.3f}"
             for key in ("unigram_entropy", "distinct_1", "distinct_2", "distinct_4", "repetition_4")}
    return (f"{name}{nfe}generative perplexity {report['gen_ppl']:.2f} ({report['judge']}: {report['judge_nll']:.4f} "
            f"nats/token), unigram entropy {shown['unigram_entropy']}, distinct-1/2/4 {shown['distinct_1']} "
            f"{shown['distinct_2']} {shown['distinct_4']}, repetition-4 {shown['repetition_4']}; "
            f"{report['samples']} texts")


def write_sweep(path: Path, document: dict[str, Any]) -> None:
    """PATH.json and PATH.png."""
    from dlm_scale.plots import draw_sweep

    json_path, png_path = path.with_suffix(".json"), path.with_suffix(".png")
    json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw_sweep(document["points"], document.get("reference"), png_path)
