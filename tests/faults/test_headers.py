"""Generated headers never crash a reader, lead it out of the folder, or make it take memory or time.

Ten thousand of them: `python -m tests.faults.report`.
"""

import random
from collections import Counter

from tests.faults import fuzz
from tests.faults.headers import headers


def test_generated_headers(tmp_path):
    found = headers(tmp_path, 500, seed=7)
    assert found.failures == () and found.total == 500
    refused = {name.split()[0] for name, _ in found.notes if name.endswith("refused")}
    assert refused == set(fuzz.KINDS)


def test_what_is_generated_differs():
    values = [fuzz.several(random.Random(i), {"a": [1, 2, {"b": "c"}], "d": {"e": [3]}}) for i in range(200)]
    assert len(Counter(map(repr, values))) > 100


def test_a_crash_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nothing"))
    (tmp_path / "case").write_text("header 0:0")
    monkeypatch.chdir(tmp_path)
    assert "header 0:0" in headers(tmp_path, 5).failures[0]
