"""A source small enough to enumerate, its exact denoiser, and the law that every sampler must reach."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

from dlm_scale.sampling import generate


@dataclass(frozen=True)
class Oracle:
    """The exact posterior of a chain, in float64; with ids beside a position, the posterior given these too. Its critic
    doubts an id the more, the less probable it is given all others."""

    chain: "Chain"

    def __call__(self, x_BL, rows_N, attention=None):
        L = self.chain.L
        state_B = (x_BL * (self.chain.V + 1) ** torch.arange(L - 1, -1, -1)).sum(1)
        return self.chain.table[state_B[rows_N // L], rows_N % L]

    def told(self, x_BL, rows_N, beside):
        """Log-probabilities [N, V + 1] once ids are put at an offset from the positions; -1: nothing is known there."""
        x_NL, place_N = x_BL[rows_N // self.chain.L].clone(), rows_N % self.chain.L
        for offset, id_N in beside.items():
            row = (id_N >= 0).nonzero()[:, 0]
            x_NL[row, place_N[row] + offset] = id_N[row]
        return self(x_NL, torch.arange(len(x_NL)) * self.chain.L + place_N)

    def local(self, x_BL, rows_N):
        again = lambda which, left, right: self.told(x_BL, rows_N[which], {-1: left, 1: right})  # noqa: E731
        return self(x_BL, rows_N), again

    def critique(self, x_BL, rows_N):
        id_N = x_BL.flatten()[rows_N]
        alone_NV = self.told(x_BL, rows_N, {0: torch.full_like(id_N, self.chain.mask_id)})
        return -alone_NV.gather(1, id_N[:, None])[:, 0]


@dataclass(frozen=True)
class Chain:
    """A Markov chain over V symbols, L long; id V is the mask. `predict` is its `Oracle`."""

    V: int
    L: int
    law_S: torch.Tensor
    table: torch.Tensor

    @property
    def mask_id(self) -> int:
        return self.V

    @cached_property
    def predict(self) -> "Oracle":
        return Oracle(self)

    def sample(self, num_rows, sampler, num_steps, seed=3, **settings):
        x_BL = torch.zeros(num_rows, self.L, dtype=torch.long)
        settings = {"is_fixed_BL": torch.zeros_like(x_BL, dtype=torch.bool)} | settings
        return generate(
            self.predict,
            settings.pop("x_BL", x_BL),
            sampler=sampler,
            num_steps=num_steps,
            seed=seed,
            mask_id=self.mask_id,
            **{"request_hashes": [17] * num_rows, "sample_indices": range(num_rows)} | settings,
        )

    def frequencies(self, ids_BL) -> torch.Tensor:
        assert int(ids_BL.min()) >= 0 and int(ids_BL.max()) < self.V
        code_B = (ids_BL * self.V ** torch.arange(self.L - 1, -1, -1)).sum(1)
        return torch.bincount(code_B, minlength=self.V**self.L).double() / len(ids_BL)

    def distance(self, ids_BL) -> float:
        """Total variation between the samples and the exact law."""
        return 0.5 * float((self.frequencies(ids_BL) - self.law_S).abs().sum())


def make_chain(V: int = 3, L: int = 4) -> Chain:
    generator = torch.Generator().manual_seed(1)
    transition = torch.softmax(1.5 * torch.randn(V, V, generator=generator, dtype=torch.float64), -1)
    first = torch.softmax(torch.randn(V, generator=generator, dtype=torch.float64), -1)
    x_SL = torch.tensor(list(itertools.product(range(V), repeat=L)))
    law_S = first[x_SL[:, 0]] * torch.stack([transition[x_SL[:, i], x_SL[:, i + 1]] for i in range(L - 1)]).prod(0)
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
    fits = ((states[:, None] == x_SL) | (states[:, None] == V)).all(-1) * law_S
    joint = torch.einsum("cs,slv->clv", fits, torch.nn.functional.one_hot(x_SL, V + 1).double())
    return Chain(V, L, law_S, (joint / joint.sum(-1, keepdim=True)).log())


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors this small run several times slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chain() -> Chain:
    return make_chain()
