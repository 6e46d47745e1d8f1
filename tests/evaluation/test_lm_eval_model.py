"""The harness's three requests, against enumeration and against a stand-in of the harness's own classes."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from dlm_scale.errors import UsageError
from dlm_scale.lm_eval_model import NAME, HarnessModel, register


def request(*arguments):
    return SimpleNamespace(args=arguments)


def conditional_nelbo(inference, context, continuation):
    """By enumeration of all masks of the continuation, one at a time."""
    ids = torch.tensor([inference.tokenizer.encode(context + continuation).tolist()])
    start, length, total = len(context), len(continuation), 0.0
    for mask in itertools.product([False, True], repeat=length):
        n = sum(mask)
        if n:
            masked = torch.tensor([[False] * start + list(mask)])
            rows_N = masked.flatten().nonzero()[:, 0]
            log_probs = inference.predict(torch.where(masked, inference.vocabulary.mask_id, ids), rows_N)
            total -= log_probs.gather(1, ids[0, rows_N, None]).sum().item() / (n * math.comb(length, n))
    return total


@pytest.mark.parametrize("context, continuation", [("ab", "cab"), ("", "abc"), ("abca", "b")])
def test_loglikelihood_is_the_conditional_nelbo(masked, context, continuation):
    model = HarnessModel.of(masked, num_draws=400)
    (found, _), = model.loglikelihood([request(context, continuation)])
    assert -found == pytest.approx(conditional_nelbo(masked, context, continuation), rel=0.05)


def test_loglikelihood_of_the_twin_is_exact_and_chains(autoregressive):
    model = HarnessModel.of(autoregressive)
    requests = [("", "abcab"), ("", "ab"), ("ab", "cab"), ("abc", "ab")]
    whole, head, tail, shorter = (pair[0] for pair in model.loglikelihood([request(*r) for r in requests]))
    assert whole == pytest.approx(head + tail, abs=1e-5) and shorter > tail
    rolling = model.loglikelihood_rolling([request("abcab"), request("abcababc")])
    assert rolling[0] == pytest.approx(whole, abs=1e-6)
    second = model.loglikelihood([request("", "abcaba"), request("", "bc")])
    assert rolling[1] == pytest.approx(second[0][0] + second[1][0], abs=1e-5)


def test_an_answer_does_not_depend_on_the_other_requests(masked):
    pairs = [("a", "bc"), ("ab", "c"), ("", "cab"), ("abc", "abc"), ("c", "ab"), ("abcabcabc", "ab")]
    requests = [request(*pair) for pair in pairs]
    together = HarnessModel.of(masked, batch_size=4).loglikelihood(requests)
    alone = [HarnessModel.of(masked, batch_size=1).loglikelihood([r])[0] for r in reversed(requests)][::-1]
    assert [g for _, g in together] == [g for _, g in alone]
    assert [p for p, _ in together] == pytest.approx([p for p, _ in alone], abs=1e-5)


def test_spaces_go_to_the_continuation_and_long_contexts_lose_their_beginning(masked):
    model = HarnessModel.of(masked)
    ids = lambda text: masked.tokenizer.encode(text).tolist()  # noqa: E731
    assert model._encode_pair("ab ", "c") == (ids("ab"), ids(" c"))
    assert model._encode_pair("abcabcabc", "ab") == (ids("cabc")[-4:], ids("ab"))
    for bad in ("", "abcabca"):
        with pytest.raises(UsageError, match="does not fit"):
            model._encode_pair("ab", bad)


def test_greedy_is_what_filling_greedily_gives(masked, autoregressive):
    for inference in (masked, autoregressive):
        model = HarnessModel.of(inference, sampler=None if inference.is_autoregressive else "threshold")
        options = {"max_gen_toks": 3, "temperature": 0.0}
        text = model.generate_until([request("ab", options)])[0]
        others = ["".join(t) for t in itertools.product("abc ", repeat=3)]
        answers = model.loglikelihood([request("ab", other) for other in others])
        greedy = [other for other, (_, is_greedy) in zip(others, answers) if is_greedy]
        assert len(greedy) == 1
        if inference.is_autoregressive:  # left to right both times
            assert greedy == [text]


def test_generation_stops_at_the_first_stop_and_does_not_depend_on_the_batch(masked):
    kinds = [{"max_gen_toks": 4, "temperature": 1.0, "do_sample": True}, {"max_gen_toks": 4, "until": ["b", "c"]}]
    requests = [request(context, options) for context in ("a", "c", "abcabc") for options in kinds]
    model = HarnessModel.of(masked, sampler="ancestral")
    texts = model.generate_until(requests)
    assert texts == [HarnessModel.of(masked, sampler="ancestral").generate_until([r])[0] for r in requests]
    assert all(len(text) == 4 for text in texts[::2])
    assert not any(set(text) & set("bc") for text in texts[1::2])


def test_registration_with_a_stand_in(masked, monkeypatch):
    """The harness's base class calls nothing of ours; its registry keeps the class under our name."""
    class LM:
        def __init__(self):
            self.cache_hook, self._rank, self._world_size = None, 0, 1

    registry = {}
    modules = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}, "lm_eval.api.registry": {
        "register_model": lambda name: lambda cls: registry.setdefault(name, cls)}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("dlm_scale.inference.load_for_inference", lambda path, device: masked)
    cls = register()
    assert registry == {NAME: cls} and issubclass(cls, LM) and not getattr(cls, "__abstractmethods__", None)
    model = cls(pretrained="anything", batch_size="auto", device="cpu", max_batch_size=None, num_draws="8")
    assert model._world_size == 1 and model.num_draws == 8
    assert len(model.loglikelihood([request("a", "b")], disable_tqdm=True)) == 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_registration_with_the_harness_itself(masked, monkeypatch):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import MODEL_REGISTRY

    monkeypatch.setattr("dlm_scale.inference.load_for_inference", lambda path, device: masked)
    monkeypatch.delitem(MODEL_REGISTRY, NAME, raising=False)
    model = register().create_from_arg_string("pretrained=x,num_draws=8", {"batch_size": 2, "device": "cpu"})
    found = model.loglikelihood([Instance("loglikelihood", {}, ("ab", "c"), 0)])
    assert found == HarnessModel.of(masked, num_draws=8).loglikelihood([request("ab", "c")])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is here")
def test_without_the_harness_the_message_says_what_to_install():
    with pytest.raises(UsageError, match="pip install lm_eval"):
        register()
