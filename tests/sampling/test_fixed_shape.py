"""The same bits for a canvas whatever else is in the batch, over real models with odd widths."""

import os
import subprocess
import sys

import pytest
import torch

from dlm_scale.config import config_from_dict
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.model.transformer import Transformer
from dlm_scale.sampling.fixed_shape import PASS_SHAPES, FixedShapePredict, PassShape
from dlm_scale.sampling.selectors import Candidates, margin, max_prob, negative_entropy
from dlm_scale.sampling.samplers import Sampler
from dlm_scale.sampling.tokens import inverse_cdf

MODELS = {
    "swiglu of odd width": (29, {"hidden_size": 40, "num_heads": 4, "ffn_size": 91}),
    "gelu, two heads": (33, {"hidden_size": 36, "num_heads": 2, "mlp": "gelu", "ffn_size": 77}),
    "adaln, larger vocabulary": (1003, {"hidden_size": 64, "num_heads": 4, "time_conditioning": "adaln"}),
    "wide": (257, {"hidden_size": 128, "num_heads": 4}),
}
LENGTHS = (1, 3, 17, 64, 130)
BATCHES = ((1, 0), (7, 0), (7, 6), (13, 9), (20, 19))  # how many canvases, and which of them is ours


def make_model(vocab: int, shape: dict) -> Transformer:
    config = config_from_dict({
        "model": {"num_layers": 2, "seq_len": 256} | shape, "data": {"train": "x"},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "num_steps": 1, "out": "x"},
        "optimizer": {"learning_rate": 1e-3},
    })  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config.model, Vocabulary(vocab, vocab - 1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def predict_of(model: Transformer, vocab: int, shape: PassShape = PASS_SHAPES["cpu"]) -> FixedShapePredict:
    return FixedShapePredict(model, vocab - 1, torch.device("cpu"), shape)


def among_others(predict, x_1L, position_N, vocab, num_rows, place):
    """Log-probabilities of a canvas's positions, from a batch of other canvases with other positions."""
    length = x_1L.shape[1]
    x_BL = torch.randint(vocab, (num_rows, length))
    x_BL[place] = x_1L
    rows = torch.cat([torch.arange(0, num_rows * length, 3), position_N + place * length]).unique()
    return predict(x_BL, rows)[torch.searchsorted(rows, position_N + place * length)]


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_move_with_the_batch(name):
    vocab, shape = MODELS[name]
    model = make_model(vocab, shape)
    for length in LENGTHS:
        torch.manual_seed(1)
        x_1L = torch.randint(vocab, (1, length))
        position_N = torch.randperm(length)[: max(1, length // 5)].sort().values
        made = [among_others(predict_of(model, vocab), x_1L, position_N, vocab, *batch) for batch in BATCHES]
        assert all(one.equal(made[0]) for one in made), length
        m_B = (x_1L == vocab - 1).float().mean(1)
        with torch.no_grad():
            plain = model(x_1L, m_B=m_B, rows_N=position_N, readout=lambda head: head.log_probs())
        torch.testing.assert_close(made[0], plain, rtol=1e-4, atol=1e-4)


def test_bits_of_the_further_heads_do_not_move_with_the_batch():
    vocab, length = 67, 17
    model = make_model(vocab, {"hidden_size": 40, "num_heads": 4, "ffn_size": 91, "critic": True, "sampler_head": True})
    torch.manual_seed(1)
    x_1L, position_N = torch.randint(vocab, (1, length)), torch.randperm(length)[:5].sort().values
    left_N, right_N = torch.tensor([-1, 3, 5, -1, 7]), torch.tensor([-1, -1, 2, 9, 60])
    found = []
    for num_rows, place in BATCHES:
        x_BL = torch.randint(vocab, (num_rows, length))
        x_BL[place] = x_1L
        rows = torch.cat([torch.arange(0, num_rows * length, 3), position_N + place * length]).unique()
        own, predict = torch.searchsorted(rows, position_N + place * length), predict_of(model, vocab)
        log_probs, again = predict.local(x_BL, rows)
        which = torch.cat([torch.arange(min(own)), own])
        beside = (torch.cat([torch.full((int(min(own)),), 4), beside_N]) for beside_N in (left_N, right_N))
        found.append((predict.critique(x_BL, rows)[own], log_probs[own], again(which, *beside)[-5:]))
    assert all(one.equal(first) for others in found for one, first in zip(others, found[0]))
    with torch.no_grad():
        plain = model(x_1L, m_B=None, rows_N=position_N,
                      readout=lambda head: (head.critic(), head.log_probs(), head.local(left_N, right_N).log_probs()))
    for one, wanted in zip(found[0], plain):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    assert predict_of(make_model(29, {"hidden_size": 40, "num_heads": 4}), 29).critique is None


@pytest.mark.slow
def test_the_same_on_the_instructions_of_older_processors():
    """There places of a pass do differ: passes shrink until they do not."""
    environ = os.environ | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    test = f"{__file__}::test_bits_do_not_move_with_the_batch"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class PlaceDependent:
    """Bits differ at the last places of a pass of more than three canvases, in a pass of one, and within the head."""

    def __init__(self, hidden_ND=None):
        self.hidden_ND = hidden_ND

    def __call__(self, x_RL, *, m_B, rows_N, readout, attention):
        hidden_RL1 = x_RL[:, :, None].float().clone()
        hidden_RL1[3:] += 1e-3
        hidden_RL1 += 1e-3 * (len(x_RL) == 1)
        return readout(PlaceDependent(hidden_RL1.flatten(0, 1)))

    def over(self, hidden_ND):
        return PlaceDependent(hidden_ND)

    def log_probs(self):
        moved_ND = self.hidden_ND.clone()
        moved_ND[1:] += 1e-3
        return moved_ND.expand(-1, 4)


def test_passes_shrink_until_all_places_agree():
    predict = FixedShapePredict(PlaceDependent(), 9, torch.device("cpu"), PassShape(64, 8, 16))
    x_BL = torch.arange(20).view(10, 2)
    made = predict(x_BL, torch.arange(1, 20, 2))
    assert made[:, 0].tolist() == list(range(1, 20, 2))
    assert predict.rows_by_length == {2: 3} and predict.head_rows == {"log_probs": 1}
    assert predict.is_as_full == {(2, 1): False, (2, 2): True}  # so the tenth canvas goes with a copy
    assert (predict.num_rows, predict.num_copies) == (11, 1)


@pytest.mark.parametrize("vocab", [29, 67, 384, 4001])
def test_what_samplers_do_with_a_row_does_not_depend_on_the_others(vocab):
    """Drift in torch's own row-wise operations would show here: any number of rows, any place, the same bits."""
    torch.manual_seed(0)
    log_probs_NV, uniform_N = torch.log_softmax(3 * torch.randn(70, vocab), -1), torch.rand(70).double()

    def all_of(part: slice):
        given = log_probs_NV[part].clone(), uniform_N[part]
        candidates = Candidates(given[0], None, given[1], given[1])
        yield from (score(candidates, Sampler()) for score in (max_prob, negative_entropy, margin))
        weights_NV = ((given[0] - given[0].amax(-1, keepdim=True)) / 0.8).exp()
        yield from (weights_NV, weights_NV.cumsum(-1, dtype=torch.float64))
        yield from (inverse_cdf(*given, 0.8, top_k, top_p) for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.9)))

    whole = list(all_of(slice(None)))
    for size in (1, 2, 5, 7, 16, 33):
        for start in (0, 1, 3, 70 - size):
            part = slice(start, start + size)
            assert all(one.equal(all_[part]) for one, all_ in zip(all_of(part), whole)), (size, start)
