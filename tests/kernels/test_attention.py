"""Attention by mask value: every backend's adapter against one oracle, packing without leaks, and the choice."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dlm_scale import ops
from dlm_scale.config import ModelConfig
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.model.transformer import Transformer

BOUNDS = torch.tensor([0, 3, 10, 11, 20], dtype=torch.int32)  # two rows of 10; one document of a single position
MASKS = [ops.Full(), ops.Causal(), ops.Blocks(4), ops.Segments(BOUNDS), ops.Lookahead(3)]


def inputs(heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(2, 10, heads, 8), (2, 10, kv_heads, 8), (2, 10, kv_heads, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def sees(mask: ops.AttentionMask, row: int, query: int, key: int, window: int = 10) -> bool:
    if abs(query - key) > window:
        return False
    if isinstance(mask, ops.Lookahead):
        return key <= query + mask.size
    if isinstance(mask, ops.Segments):
        return not any(row * 10 + min(query, key) < bound <= row * 10 + max(query, key) for bound in BOUNDS.tolist())
    if isinstance(mask, ops.Full):
        return True
    size = mask.size if isinstance(mask, ops.Blocks) else 1
    return key // size <= query // size


def oracle(q, k, v, mask, window: int = 10) -> torch.Tensor:
    """One softmax at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    share = q.shape[2] // k.shape[2]
    rows = []
    for b in range(2):
        for i in range(10):
            keys = [j for j in range(10) if sees(mask, b, i, j, window)]
            heads = []
            for h in range(q.shape[2]):
                p = torch.softmax(k[b, keys, h // share] @ q[b, i, h] / q.shape[3] ** 0.5, 0)
                heads.append(p @ v[b, keys, h // share])
            rows.append(torch.stack(heads))
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_a_window_leaves_the_near_keys_of_every_mask(mask, backend):
    tensors = inputs()
    found = with_gradients(lambda *qkv: ops.attention(*qkv, mask, backend, 2), tensors)
    for a, b in zip(found, with_gradients(lambda *qkv: oracle(*qkv, mask, 2), tensors)):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ops.BackendError, match="has no window"):
        ops.attention(*tensors, mask, "flash_attn_2", 2)


def with_gradients(function, tensors) -> list[torch.Tensor]:
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.double().square().sum(), tensors)]


def assert_is_the_oracle(function, tensors, mask) -> None:
    found, wanted = (with_gradients(lambda q, k, v: f(q, k, v, mask), tensors) for f in (function, oracle))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa_is_the_oracle(mask, kv_heads):
    assert_is_the_oracle(ops.attention, inputs(kv_heads=kv_heads), mask)


def attend_packed(q, k, v, bounds, causal: bool) -> torch.Tensor:
    """Documents [T, heads, E], each on its own."""
    kind = ops.Causal() if causal else ops.Full()
    edges = bounds.tolist()
    parts = [ops._sdpa(q[None, a:b], k[None, a:b], v[None, a:b], kind)[0] for a, b in zip(edges, edges[1:])]
    return torch.cat(parts)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Fakes of flash_attn and torch's varlen that compute on the CPU and record how they were called."""
    recorded = []

    def dense(q, k, v, *, causal, deterministic):
        recorded.append({"name": "dense", "causal": causal, "deterministic": deterministic})
        return ops._sdpa(q, k, v, ops.Causal() if causal else ops.Full())

    def packed(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, deterministic):
        recorded.append({"name": "packed", "causal": causal, "bounds": cu_q, "max": (max_q, max_k)})
        assert cu_q is cu_k and q.ndim == k.ndim == 3
        return attend_packed(q, k, v, cu_q, causal)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        recorded.append({"name": "varlen", "window": window_size, "gqa": enable_gqa, "bounds": cu_q,
                         "max": (max_q, max_k)})  # fmt: skip
        return attend_packed(q, k, v, cu_q, causal=False)

    flash = types.SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    return recorded


@pytest.mark.parametrize("name, mask", [(name, mask) for name, backend in ops.ATTENTION_BACKENDS.items()
                                        for mask in MASKS if type(mask) in backend.masks])  # fmt: skip
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_adapter_is_the_oracle(name, mask, kv_heads, calls):
    assert_is_the_oracle(ops.ATTENTION_BACKENDS[name].run, inputs(kv_heads=kv_heads), mask)
    if isinstance(mask, ops.Segments) and name not in ("sdpa", "eager"):
        bounds = calls[0]["bounds"]
        assert bounds.dtype == torch.int32 and bounds.tolist() == BOUNDS.tolist() and calls[0]["max"] == (10, 10)
        assert calls[0].get("window", (-1, -1)) == (-1, -1) and not calls[0].get("causal")
        assert calls[0].get("gqa", kv_heads == 2) == (kv_heads == 2)
    if name == "flash_attn_2" and not isinstance(mask, ops.Segments):
        assert calls[0] == {"name": "dense", "causal": isinstance(mask, ops.Causal), "deterministic": False}


def test_bounds_of_another_integer_type_are_converted(calls):
    q, k, v = inputs()
    ops.ATTENTION_BACKENDS["flash_attn_2"].run(q, k, v, ops.Segments(BOUNDS.long()))
    assert calls[0]["bounds"].dtype == torch.int32


def test_deterministic_algorithms_are_asked_for(calls):
    torch.use_deterministic_algorithms(True)
    try:
        ops.ATTENTION_BACKENDS["flash_attn_2"].run(*inputs(), ops.Full())
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[0]["deterministic"]


@pytest.fixture
def gpu(monkeypatch):
    """A pretended H100 on which every importable backend agrees with the reference; `gpu[name] = error` overrides."""
    errors, switched = {}, []
    switches = types.SimpleNamespace(
        activate_flash_attention_impl=switched.append,
        restore_flash_attention_impl=lambda _raise_warn: switched.append(None),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "torch.nn.attention", switches)
    names = {id(backend): name for name, backend in ops.ATTENTION_BACKENDS.items()}
    monkeypatch.setattr(ops, "_attention_error", lambda backend, *_: errors.get(names[id(backend)], 1e-3))
    ops.choose_attention.cache_clear()
    yield types.SimpleNamespace(errors=errors, switched=switched, install=lambda name: monkeypatch.setitem(
        sys.modules, name, types.SimpleNamespace()))  # fmt: skip
    ops.choose_attention.cache_clear()


def choose(requested: str = "auto", mask: type = ops.Full, dtype=torch.bfloat16) -> tuple[str, str]:
    ops.choose_attention.cache_clear()
    return ops.choose_attention(requested, "cuda", dtype, 64, mask)


def test_the_order_of_choice(gpu):
    name, why = choose()
    assert name == "sdpa" and "not flash_attn_3: ModuleNotFoundError" in why
    gpu.install("torch.nn.attention.varlen")
    assert choose(mask=ops.Segments)[0] == "torch_varlen"
    gpu.install("flash_attn")
    assert choose(mask=ops.Segments)[0] == "flash_attn_2" and choose()[0] == "sdpa"
    gpu.install("flash_attn_interface")
    assert choose() == ("flash_attn_3", "first choice") and choose(mask=ops.Segments)[0] == "flash_attn_3"
    assert choose(mask=ops.Blocks)[0] == "sdpa" and choose(dtype=torch.float32)[0] == "sdpa"
    assert gpu.switched[-1] == "FA3"


def test_a_backend_that_differs_from_the_reference_is_passed_over_and_switched_off(gpu):
    gpu.install("flash_attn_interface")
    gpu.errors["flash_attn_3"] = 0.5
    name, why = choose()
    assert name == "sdpa" and "differs from the reference by 5.0e-01" in why and gpu.switched == ["FA3", None]


@pytest.mark.parametrize(
    "requested, mask, complaint",
    [
        ("flash_attn_2", ops.Full, "No module named 'flash_attn'.*pip install flash-attn"),
        ("flash_attn_4", ops.Full, "pip install --pre flash-attn-4"),
        ("flash_attn_2", ops.Blocks, "has no mask Blocks"),
        ("torch_varlen", ops.Full, "has no mask Full"),
        ("flash", ops.Full, "unknown: use auto or one of"),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error(requested, mask, complaint, gpu):
    with pytest.raises(ops.BackendError, match=complaint):
        choose(requested, mask)


def test_a_named_backend_on_a_cpu_is_an_error_that_the_mains_report():
    from dlm_scale.errors import UsageError

    with pytest.raises(ValueError, match="needs a CUDA device") as caught:
        ops.attention(*inputs(), ops.Full(), backend="flash_attn_2")
    assert isinstance(caught.value, UsageError) and "or use auto" in str(caught.value)
    assert torch.equal(ops.attention(*inputs(), ops.Full(), backend="sdpa"), ops.attention(*inputs(), ops.Full()))


@pytest.mark.parametrize("op", ["linear_cross_entropy", "masking"])
def test_kernels_by_name(op, monkeypatch):
    assert ops.choose_kernels(op, "reference", "cuda")[0] == "reference"
    name, why = ops.choose_kernels(op, "auto", "cpu")
    assert name == "reference" and "needs a CUDA device" in why
    with pytest.raises(ops.BackendError, match="cannot run here"):
        ops.choose_kernels(op, "triton", "cpu")
    with pytest.raises(ops.BackendError, match="unknown"):
        ops.choose_kernels(op, "cuda", "cpu")


@pytest.mark.parametrize("error", [1e-6, 0.5, ImportError("no triton")])
def test_kernels_run_on_a_gpu_where_they_agree_with_the_reference(error, monkeypatch):
    """Also where the first call comes from an evaluation, without gradients."""

    def self_check(device):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(ops, "_triton", lambda op: types.SimpleNamespace(self_check=self_check))
    ops.choose_kernels.cache_clear()
    with torch.inference_mode():
        name, why = ops.choose_kernels("masking", "auto", "cuda")
    ops.choose_kernels.cache_clear()
    assert (name, why) == {
        "1e-06": ("triton", "agrees with the reference here"),
        "0.5": ("reference", "not triton: it differs from the reference by 5.0e-01"),
        "no triton": ("reference", "not triton: ImportError: no triton (install the triton that this torch names)"),
    }[str(error)]


@pytest.mark.parametrize("name, mask", [("sdpa", mask) for mask in (ops.Full, ops.Causal, ops.Segments)]
                         + [("flash_attn_2", ops.Segments)])  # fmt: skip
def test_the_check_before_first_use_passes_what_is_right_and_sees_what_is_wrong(name, mask, calls):
    backend = ops.ATTENTION_BACKENDS[name]
    assert ops._attention_error(backend, "cpu", torch.bfloat16, 64, mask) < 1e-2
    wrong = types.SimpleNamespace(run=lambda q, k, v, m: backend.run(q * 1.1, k, v, m))
    assert ops._attention_error(wrong, "cpu", torch.bfloat16, 64, mask) > 2e-2


def test_the_doctor_is_told_what_runs_and_why():
    told = ops.chosen_backends()
    assert told["attention"].startswith("sdpa (") and told["linear_cross_entropy"].startswith("reference (not triton")
    assert set(told) == {"attention", "attention, packed", "linear_cross_entropy", "masking"}


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, seq_len=10)
    model = Transformer(config, Vocabulary(12, 11))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs_and_gradients(model, x_BL, rows_N, mask) -> list[torch.Tensor]:
    """Logits at some rows, and the gradients of their cross-entropy in all parameters."""
    model.zero_grad()
    logits = model(x_BL, rows_N=rows_N, readout=lambda head: head.logits(), attention=mask)
    target_N, weight_N = torch.arange(len(rows_N)) % 5, torch.ones(len(rows_N))
    loss, _, _ = model(x_BL, rows_N=rows_N, readout=lambda h: h.cross_entropy(target_N, weight_N), attention=mask)
    loss.backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("changed", [0, 2, 9, 15])
def test_a_token_of_one_document_changes_no_bit_of_another(changed, model):
    """Documents are [0, 3), [3, 10), [10, 11), [11, 20)."""
    x_BL = torch.randint(0, 11, (2, 10), generator=torch.Generator().manual_seed(1))
    other_BL = x_BL.clone()
    other_BL.view(-1)[changed] = (x_BL.view(-1)[changed] + 1) % 11
    edges = BOUNDS.tolist()
    for start, stop in zip(edges, edges[1:]):
        rows_N = torch.arange(start, stop)
        before, after = (outputs_and_gradients(model, ids, rows_N, ops.Segments(BOUNDS)) for ids in (x_BL, other_BL))
        same = all(map(torch.equal, before, after))
        assert same == (not start <= changed < stop)


def test_the_first_position_of_a_document_depends_on_its_last(model):
    """Bidirectional: the gradient of the first output in the last input is not zero, and beyond the document it is."""
    x_BL = torch.randint(0, 11, (2, 10), generator=torch.Generator().manual_seed(1))
    inputs = {}
    handle = model.embedding.register_forward_hook(
        lambda module, args, out: inputs.setdefault("hidden", out.detach().requires_grad_())
    )
    logits = model(x_BL, rows_N=torch.tensor([11]), readout=lambda head: head.logits(),
                   attention=ops.Segments(BOUNDS))  # fmt: skip
    handle.remove()
    gradient = torch.autograd.grad(logits[logits.isfinite()].square().sum(), inputs["hidden"])[0].view(20, -1)
    assert gradient[19].abs().max() > 1e-6 and not gradient[:11].any()


def test_attention_is_compiled_in_one_graph():
    def block(q, k, v):
        return ops.attention(q, k, v, ops.Full()) + ops.attention(q, k, v, ops.Full(), backend="sdpa")

    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), 2 * ops.attention(*inputs(), ops.Full()))
