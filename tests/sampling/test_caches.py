"""Kept keys and values against the network without them, where theory says that both are the same."""

import functools

import pytest
import torch

from dlm_scale import ops
from dlm_scale.config import ModelConfig
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.model.transformer import Transformer
from dlm_scale.sampling import generate

V, L, SIZE = 8, 16, 4
SHAPES = {
    "plain": {},
    "grouped, normed keys": {"num_kv_heads": 2, "qk_norm": True},
    "adaln": {"time_conditioning": "adaln"},
}


def network(num_layers=3, **changes):
    config = ModelConfig(**{"num_layers": num_layers, "hidden_size": 32, "num_heads": 4, "seq_len": L} | changes)
    model = Transformer(config, Vocabulary(V + 1, V)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


class Predict:
    """The network as a callable; remembers how many positions each pass computed, and how far it was from none kept."""

    def __init__(self, model, attention=None):
        self.model, self.attention = model, attention
        self.computed, self.error = [], 0.0

    def __call__(self, x_BL, rows_N, cache=None):
        look = functools.partial(
            self.model, x_BL, m_B=(x_BL == V).float().mean(1), rows_N=rows_N, readout=lambda head: head.log_probs(),
            attention=self.attention,
        )  # fmt: skip
        found, exact = look(cache=cache), look()
        self.computed.append(L if cache is None or cache.position_AS is None else cache.position_AS.shape[1])
        possible = exact > -torch.inf
        self.error = max(self.error, float((found - exact)[possible].abs().max()))
        return found


def sample(predict, num_rows=3, sampler="entropy", rows=None, **settings):
    generator = torch.Generator().manual_seed(1)
    x_BL = torch.randint(V, (num_rows, settings.pop("length", L)), generator=generator)
    is_fixed_BL = torch.arange(x_BL.shape[1]) < torch.tensor(settings.pop("num_fixed", [3, 0, 9, 4]))[:num_rows, None]
    rows = range(num_rows) if rows is None else rows
    return generate(
        predict, x_BL[rows], is_fixed_BL[rows], sampler=sampler, seed=2, request_hashes=list(rows), mask_id=V,
        sample_indices=[0] * len(rows), **{"num_steps": L, "block_size": SIZE} | settings,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("settings", [{}, {"sampler": "remdm"}, {"guidance": 1.0}, {"length": 22, "context": L}])
def test_refreshed_at_every_pass_it_is_no_cache(shape, kind, settings):
    predict = Predict(network(**SHAPES[shape]))
    plain = sample(predict, num_steps=40, **settings)
    kept = sample(predict, num_steps=40, cache=kind, refresh_every=1, **settings)
    assert kept.ids_BL.equal(plain.ids_BL) and kept.nfe_B.equal(plain.nfe_B)
    assert predict.error == 0.0 and set(predict.computed) == {L}


@pytest.mark.parametrize("shape", ["plain", "grouped, normed keys"])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize(
    "num_layers, attention",
    [(3, ops.Blocks(SIZE)), (1, None)],
    ids=["block-causal attention", "one layer, whose keys are the tokens'"],
)
def test_where_keys_outside_the_block_cannot_change_it_is_exact(shape, kind, num_layers, attention):
    predict = Predict(network(num_layers, **SHAPES[shape]), attention)
    kept = sample(predict, cache=kind)
    assert min(predict.computed) == SIZE and predict.error < 1e-5
    assert kept.ids_BL.equal(sample(predict).ids_BL)
    assert sample(predict, cache=kind, guidance=0.7).ids_BL.equal(sample(predict, guidance=0.7).ids_BL)
    assert predict.error < 1e-5


@pytest.mark.parametrize("kind, widths", [("prefix", {16, 12, 8, 4}), ("dual", {4})])
def test_a_block_begins_with_a_whole_pass_and_goes_on_with_parts(kind, widths):
    predict = Predict(network())
    sample(predict, num_rows=2, rows=[1], cache=kind)
    assert predict.computed[::SIZE] == [L] * 4
    parts = [width for number, width in enumerate(predict.computed) if number % SIZE]
    assert len(predict.computed) == L and set(parts) == widths
    assert predict.error > 1e-3  # two layers and more see changed tokens through the positions outside


@pytest.mark.parametrize("every, whole", [(0, 4), (2, 8), (3, 8), (4, 4), (9, 4)])
def test_refreshing(every, whole):
    predict = Predict(network())
    sample(predict, num_rows=2, rows=[1], cache="dual", refresh_every=every)
    assert predict.computed.count(L) == whole and len(predict.computed) == L


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize(
    "settings",
    [{"sampler": "threshold"}, {"sampler": "ancestral"}, {"guidance": 1.0},
     {"length": 22, "context": L, "block_size": 3}],
)  # fmt: skip
def test_a_sample_does_not_depend_on_its_batch(kind, settings):
    """Rows reach their blocks at different passes; each has its own keys and its own refreshes. Something is fixed in
    each: in a row of masks alone all positions are alike, and rounding would order them."""
    predict = Predict(network())
    settings = {"cache": kind, "num_steps": 30, "refresh_every": 3, "num_fixed": [3, 1, 9, 4]} | settings
    whole = sample(predict, 4, **settings)
    for row in range(4):
        alone = sample(predict, 4, rows=[row], **settings)
        assert alone.ids_BL[0].equal(whole.ids_BL[row]) and alone.nfe_B[0] == whole.nfe_B[row]


def test_packed_documents_are_refused():
    predict = Predict(network(), ops.Segments(torch.tensor([0, 5, L, 2 * L, 3 * L], dtype=torch.int32)))
    with pytest.raises(ValueError, match="packed documents: leave out the cache"):
        sample(predict, cache="dual")
