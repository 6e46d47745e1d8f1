"""How varied token sequences are. A judge's score alone can be bought with repetition: these stand beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

REPEAT_WINDOW = 4


def unigram_entropy(rows: Sequence[Sequence[int]]) -> float | None:
    """Mean over rows of the entropy, nats, of a row's own token frequencies (as for MDLM's samples); None for no token.

    A row of n tokens cannot have more than ln n, so that only rows of one length compare.
    """
    entropies = [_entropy(Counter(row)) for row in rows if len(row)]
    return sum(entropies) / len(entropies) if entropies else None


def _entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of all rows; None where no row is so long."""
    seen = Counter(gram for row in rows for gram in _grams(row, n))
    return len(seen) / sum(seen.values()) if seen else None


def repetition(rows: Sequence[Sequence[int]], n: int = REPEAT_WINDOW) -> float | None:
    """Mean over rows of the share of n-grams that occurred earlier in the same row; None where no row is so long."""
    shares = [1 - len(set(grams)) / len(grams) for row in rows if (grams := list(_grams(row, n)))]
    return sum(shares) / len(shares) if shares else None


def _grams(row: Sequence[int], n: int):
    return zip(*(row[i:] for i in range(n)))


def variety(rows: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """unigram_entropy (nats), distinct_1, distinct_2, distinct_4, repetition_4."""
    return {
        "unigram_entropy": unigram_entropy(rows),
        **{f"distinct_{n}": distinct_n(rows, n) for n in (1, 2, 4)},
        "repetition_4": repetition(rows),
    }
