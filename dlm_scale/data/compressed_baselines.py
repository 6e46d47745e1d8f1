"""What general compressors make of a text: the yardsticks beside a model's bits per byte."""

from __future__ import annotations

import gzip
import lzma

import numpy as np

from dlm_scale.errors import UsageError


def baselines(text: bytes) -> dict[str, float]:
    """Bits per byte of the byte unigram entropy (of this text itself), gzip -9 and xz -9. UsageError on no bytes."""
    if not text:
        raise UsageError("cannot measure the compressed size of an empty text")
    p = np.bincount(np.frombuffer(text, dtype=np.uint8)) / len(text)
    p = p[p > 0]
    return {
        "unigram_bits_per_byte": float(-(p * np.log2(p)).sum()) + 0.0,
        "gzip9_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
