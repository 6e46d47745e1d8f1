"""Models that score generated text: any Hugging Face causal model in a local folder, or the built-in n-gram.

A judge's figure is the negative log-likelihood per token of its own tokenizer. The n-gram judge reads the samples'
tokens; a Hugging Face model reads their text, and leaves out the first token, which nothing precedes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_scale.errors import UsageError
from dlm_scale.evaluation.ngram import NgramJudge

NGRAM = "ngram"
MAX_JUDGE_TOKENS = 20_000_000  # counted in memory


@dataclass(frozen=True)
class Sample:
    """A generated text, its token ids, and the passes that it took (None: not known)."""

    text: str
    tokens: Sequence[int]
    nfe: int | None = None


@dataclass(frozen=True)
class Judge:
    """score(samples) -> of each sample, which has a `text` and `tokens`, (nats in all, tokens scored)."""

    name: str
    score: Callable[[Sequence[Sample]], list[tuple[float, int]]]


def judged(judge: Judge, samples: Sequence[Sample]) -> dict[str, Any]:
    """gen_ppl = exp(all nats / all tokens), judge_nll, its standard error with samples as the sampling unit, tokens."""
    pairs = judge.score(samples)
    nats, tokens = math.fsum(n for n, _ in pairs), sum(t for _, t in pairs)
    if not tokens:
        raise UsageError(f"judge {judge.name}: the samples hold no token that it could score")
    mean, count = nats / tokens, len(pairs)
    residual = math.fsum((n - mean * t) ** 2 for n, t in pairs)
    se = math.sqrt(count / (count - 1) * residual) / tokens if count > 1 else None
    return {"judge": judge.name, "gen_ppl": math.exp(min(mean, 700.0)), "judge_nll": mean, "judge_nll_se": se,
            "judge_tokens": tokens}


def ngram_judge(rows: Iterable[Sequence[int]], vocab_size: int, order: int = 5) -> Judge:
    """The interpolated n-gram over `rows` of the token ids that the samples are made of."""
    model = NgramJudge(rows, vocab_size, order)

    def score(samples: Sequence[Sample]) -> list[tuple[float, int]]:
        return [(math.fsum(model.nll(sample.tokens)), len(sample.tokens)) for sample in samples]

    return Judge(f"{order}-gram", score)


def rows_for_judge(source: str | None, inference: Any) -> list[Any]:
    """Token rows that the n-gram judge counts: of a text file, of a dataset prefix, or of the run's training data."""
    if source is not None and Path(source).is_file():
        return [inference.tokenizer.encode(Path(source).read_text(encoding="utf-8"))[:MAX_JUDGE_TOKENS]]
    from dlm_scale.data.loader import open_split, require_same_tokenizer

    prefixes = [source] if source is not None else [member.path for member in inference.config.data.train]
    rows = []
    for prefix in prefixes:
        meta, _, data = open_split(prefix)
        require_same_tokenizer(inference.tokenizer_meta, meta, str(inference.checkpoint.path), prefix)
        rows.append(data.tokens[: MAX_JUDGE_TOKENS // len(prefixes)].astype("int64"))
    return rows


def causal_judge(folder: str, device: str = "cpu", batch_size: int = 8) -> Judge:
    """A Hugging Face causal model and its tokenizer from a local folder. Nothing is downloaded, none of its code runs.

    Texts longer than the model's context are scored in windows side by side, each without the token before it.
    Raises UsageError where transformers or the folder are absent, or the folder holds no such model.
    """
    from dlm_scale.data.optional import import_optional

    if not Path(folder).is_dir():
        raise UsageError(f"--judge={folder}: no such folder. Give the folder of a causal language model (config.json, "
                         f"weights in safetensors, tokenizer files), or --judge={NGRAM}")
    transformers = import_optional("transformers", f"--judge={folder}")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--judge={folder}: transformers cannot load a causal model and its tokenizer from there: "
                         f"{error}") from error
    model = model.to(device).eval()
    context = getattr(model.config, "max_position_embeddings", None) or 1024

    def score(samples: Sequence[Sample]) -> list[tuple[float, int]]:
        totals = [[0.0, 0] for _ in samples]
        rows = [tokenizer(sample.text, add_special_tokens=False)["input_ids"] for sample in samples]
        windows = [(i, ids[start : start + context]) for i, ids in enumerate(rows)
                   for start in range(0, len(ids), context)]
        windows = sorted((w for w in windows if len(w[1]) > 1), key=lambda window: len(window[1]))
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for (i, ids), nats in zip(batch, causal_nats(model, [ids for _, ids in batch])):
                totals[i][0] += nats
                totals[i][1] += len(ids) - 1
        return [(nats, tokens) for nats, tokens in totals]

    return Judge(Path(folder).name, score)


def causal_nats(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """Nats of all tokens but the first of each row, padded on the right: a causal model never looks there."""
    import torch
    import torch.nn.functional as F

    width = max(map(len, rows))
    ids_BL = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    length_B1 = torch.tensor([[len(row)] for row in rows], device=model.device)
    with torch.no_grad():
        logits_BLV = model(input_ids=ids_BL).logits[:, :-1].float()
    ce_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none").double()
    is_real_BL = torch.arange(1, width, device=model.device) < length_B1
    return torch.where(is_real_BL, ce_BL, 0.0).sum(1).tolist()
