"""The zero-shot suite of MDLM (arXiv 2406.07524, table 3): likelihoods of seven held-out sets.

Window protocol `wrap`: the documents of a set are detokenized, tokenized, joined in order, each followed by the
tokenizer's separator where it has one, and cut into windows of the context length; the tail that fills no window is
left out. Every token of a window is scored, separators too. (MDLM also puts a begin and an end token around each
window; papers that name another protocol are not to be compared with these figures.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm_scale.data.sources import open_source
from dlm_scale.diffusion.likelihood import summarise
from dlm_scale.engine.evaluation import dataset_sums
from dlm_scale.errors import UsageError
from dlm_scale.evaluation import detokenizers
from dlm_scale.evaluation.likelihoods import LikelihoodOptions, Progress, checkpoint_report, sums_of_batch

PROTOCOL = "wrap"
SUFFIXES = (".jsonl", ".parquet", ".jsonl.zst")


@dataclass(frozen=True)
class ZeroShotSet:
    """Where a set is on the Hub (`hf:NAME:CONFIG:SPLIT`), its column of text, and how its tokenization is undone."""

    hub: str
    column: str
    rules: list[detokenizers.Rule]


SETS = {
    "ptb": ZeroShotSet("hf:ptb-text-only/ptb_text_only::validation", "sentence", detokenizers.PTB),
    "wikitext": ZeroShotSet("hf:Salesforce/wikitext:wikitext-103-raw-v1:validation", "text", detokenizers.WIKITEXT),
    "lm1b": ZeroShotSet("hf:billion-word-benchmark/lm1b::test", "text", detokenizers.LM1B),
    "lambada": ZeroShotSet("hf:EleutherAI/lambada_openai:default:test", "text", detokenizers.LAMBADA),
    "ag_news": ZeroShotSet("hf:fancyzhx/ag_news::test", "text", []),
    "arxiv": ZeroShotSet("hf:armanc/scientific_papers:arxiv:validation", "article", detokenizers.SCIENTIFIC),
    "pubmed": ZeroShotSet("hf:armanc/scientific_papers:pubmed:validation", "article", detokenizers.SCIENTIFIC),
}


class TextWindows:
    """Rows of texts by the protocol `wrap`, at most `max_rows` (0: all), then evenly spread over the text."""

    def __init__(self, texts: Any, tokenizer: Any, seq_len: int, max_rows: int = 0):
        separator = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        pieces, num_bytes = [], 0
        for text in texts:
            pieces += [tokenizer.encode(text), np.array(separator, np.int64)]
            num_bytes += len(text.encode())
        tokens = np.concatenate([*pieces, np.empty(0, np.int64)])
        windows = len(tokens) // seq_len
        if not windows:
            raise UsageError(f"{len(tokens)} tokens are fewer than one window of {seq_len}")
        self._ids_WL = tokens[: windows * seq_len].reshape(windows, seq_len)
        self.num_rows = min(max_rows, windows) if max_rows else windows
        self._window_of_row = np.arange(self.num_rows) * windows // self.num_rows
        self.bytes_per_token = num_bytes / len(tokens)

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """int64 [B, L]."""
        return self._ids_WL[self._window_of_row[row_B]]


def chosen_sets(names: str | None) -> list[str]:
    """The sets that `--sets` names, all by default. Raises UsageError for one that does not exist."""
    chosen = names.split(",") if names else list(SETS)
    wrong = [name for name in chosen if name not in SETS]
    if wrong:
        raise UsageError(f"--sets: {', '.join(wrong)} is not in the suite; it has: {', '.join(SETS)}")
    return chosen


def source_of(name: str, folder: str | None) -> str:
    """The set on the Hub, or its file in `folder`. Raises UsageError where the folder does not have it."""
    if folder is None:
        return SETS[name].hub
    found = [path for suffix in SUFFIXES if (path := Path(folder) / f"{name}{suffix}").is_file()]
    if not found:
        raise UsageError(f"--from={folder}: no {name}{SUFFIXES[0]} or {name}{SUFFIXES[1]} (column "
                         f"{SETS[name].column!r}) there; put it there, or leave the set out with --sets")
    return str(found[0])


def texts_of(name: str, folder: str | None) -> Any:
    """The detokenized documents of a set; empty ones are left out. Raises UsageError where it cannot be read."""
    found = SETS[name]
    undo = detokenizers.detokenizer(found.rules)
    documents: Callable = open_source(source_of(name, folder), text_key=found.column).documents
    return (undo(document.text) for document in documents() if document.text.strip())


def evaluate_sets(inference: Any, names: str | None, folder: str | None, max_rows: int, options: LikelihoodOptions,
                  runtime: Any) -> dict[str, Any]:
    """{"suite", "protocol", "sets": {name: report}}. Collective."""
    if inference.tokenizer is None:
        raise UsageError(f"{inference.checkpoint.path} was trained on synthetic tokens: it reads no text")
    chosen = chosen_sets(names)
    for name in chosen:
        source_of(name, folder)  # all there before the first is evaluated
    reports = {}
    for name in chosen:
        try:
            data = TextWindows(texts_of(name, folder), inference.tokenizer, inference.seq_len, max_rows)
        except UsageError as error:
            raise UsageError(f"zero-shot set {name}: {error}") from error
        progress = Progress(data.num_rows, options.batch_size, runtime)
        sums = dataset_sums(sums_of_batch(inference, options), data, options.batch_size, runtime.mesh, progress)
        reports[name] = checkpoint_report(inference, summarise(sums), data, options)
    return {"suite": "mdlm", "protocol": PROTOCOL, "sets": reports}
