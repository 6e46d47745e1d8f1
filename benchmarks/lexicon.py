"""A text whose model can be sure: words drawn evenly from a lexicon of 48, so all of a word but its start is certain.

    python benchmarks/lexicon.py lexicon.txt

A word costs ln 48 nats, 0.61 a character with the space after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm_scale.diffusion.rng import philox

NUM_WORDS, LONGEST = 48, 8


def lexicon_text(length: int = 180_000, seed: int = 1) -> str:
    """`length` words of 3 to 8 letters; the same seed gives the same text everywhere."""
    letters = philox(seed, np.arange(NUM_WORDS * LONGEST), 0, 0, 0)[0] % 26
    sizes = 3 + philox(seed, np.arange(NUM_WORDS), 0, 1, 0)[0] % 6
    spelled = ["".join(chr(ord("a") + i) for i in row) for row in letters.reshape(NUM_WORDS, LONGEST)]
    words = [word[:size] for word, size in zip(spelled, sizes)]
    picks = philox(seed, np.arange(length), 0, 2, 0)[0] % NUM_WORDS
    return " ".join(words[i] for i in picks) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(lexicon_text(), encoding="utf-8")
