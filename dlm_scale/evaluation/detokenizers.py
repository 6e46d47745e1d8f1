"""Undoing the word tokenization of the zero-shot sets, so that a model sees text as it was written.

Each is the list of replacements that the literature uses for its set (the ones of MDLM, arXiv 2406.07524, section 5.2,
after SEDD and the Megatron evaluations), in order; perplexities per token only compare between equal lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Rule = tuple[str, str]  # a regular expression and its replacement


def _glued_left(marks: str) -> list[Rule]:
    """`word , next` to `word, next`."""
    return [(rf" {re.escape(mark)} ", f"{mark} ") for mark in marks]


def _hugging(pairs: Sequence[str], inside: str) -> list[Rule]:
    """`( words )` to `(words)`; `inside` is what may stand between the two marks."""
    rules = []
    for left, right in pairs:
        escaped = re.escape(left) if left == right else re.escape(left + right)
        body = inside.format(marks=escaped)
        rules.append((rf"{re.escape(left)}\s{body}\s{re.escape(right)}", rf"{left}\1{right}"))
    return rules


WIKITEXT: list[Rule] = [
    ("s '", "s'"),
    (r"' (?=[0-9])", "'"),
    (r" @([-,.])@ ", r"\1"),
    *_glued_left(":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
PTB: list[Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    (r" N(?= )", " 1"),
    (r"\$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]
LM1B: list[Rule] = [
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" ([?!])( |$)", r"\1\2"),
    *_glued_left(",:;"),
    (" / ", "/"),
    *_hugging(['""', "''"], "([^{marks}]+)"),
    *_hugging(["()", "[]"], "([^{marks}]+)"),
    (r"([$£]) ", r"\1"),
]
LAMBADA: list[Rule] = [("[“”]", '"'), (r"\A\s*", "\n"), (r"\s+\Z", "")]
SCIENTIFIC = WIKITEXT + LM1B


def detokenizer(rules: Sequence[Rule]) -> Callable[[str], str]:
    """The rules, one after the other."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def undo(text: str) -> str:
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return undo
