"""A Markov chain small enough to enumerate: every sequence, every mask set, hence the exact NELBO of any predictor."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

V, L = 3, 5
MASK_ID = V


@dataclass(frozen=True)
class Chain:
    """`x_XL` all V**L sequences, `log_p_X` their log-probabilities, `masks_ML` all 2**L mask sets."""

    x_XL: torch.Tensor
    log_p_X: torch.Tensor
    masks_ML: torch.Tensor

    @property
    def entropy(self) -> float:
        return -(self.log_p_X.exp() * self.log_p_X).sum().item()

    def oracle(self, xt_NL: torch.Tensor) -> torch.Tensor:
        """Exact posterior marginals [N, L, V] of the chain given the visible ids."""
        fits_NX = ((xt_NL[:, None] == self.x_XL) | (xt_NL[:, None] == MASK_ID)).all(-1)
        joint_NX = fits_NX * self.log_p_X.exp()
        marginal_NLV = torch.einsum("nx,xlv->nlv", joint_NX, F.one_hot(self.x_XL, V).double())
        return marginal_NLV / marginal_NLV.sum(-1, keepdim=True)

    def random_net(self, seed: int = 5):
        """A predictor whose conditionals belong to no joint law."""
        weight = torch.randn((V + 1) * L, L * V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return lambda xt_NL: torch.softmax((F.one_hot(xt_NL, V + 1).double().flatten(1) @ weight).view(-1, L, V), -1)

    def ce_table(self, predictor) -> torch.Tensor:
        """[X, M, L] cross-entropy of each masked position of each sequence under each mask set, 0 where visible."""
        table = torch.zeros(len(self.x_XL), len(self.masks_ML), L, dtype=torch.float64)
        for j, mask_L in enumerate(self.masks_ML):
            probability = predictor(torch.where(mask_L, MASK_ID, self.x_XL)).gather(-1, self.x_XL[..., None])[..., 0]
            table[:, j] = torch.where(mask_L, -probability.log(), 0.0)
        return table

    def exact_nelbo(self, ce_XML: torch.Tensor) -> torch.Tensor:
        """[X] nats: the sum over mask sets of S / (n * binomial(L, n))."""
        share = [0.0 if n == 0 else 1 / (n * math.comb(L, n)) for n in self.masks_ML.sum(-1).tolist()]
        return ce_XML.sum(-1) @ torch.tensor(share, dtype=torch.float64)

    def ce_fn(self, ce_XML: torch.Tensor):
        """corrupted -> ce_N, looked up."""
        base_X = torch.tensor([V ** (L - 1 - i) for i in range(L)])
        base_M = torch.tensor([2 ** (L - 1 - i) for i in range(L)])

        def lookup(corrupted) -> torch.Tensor:
            x0_BL = corrupted.xt_BL.clone()
            x0_BL.view(-1)[corrupted.rows_N] = corrupted.target_N
            ce_BL = ce_XML[(x0_BL * base_X).sum(-1), (corrupted.is_masked_BL * base_M).sum(-1)]
            return ce_BL.reshape(-1)[corrupted.rows_N].float()

        return lookup


@pytest.fixture(scope="session")
def chain() -> Chain:
    generator = torch.Generator().manual_seed(1)
    step_VV = torch.log_softmax(1.5 * torch.randn(V, V, generator=generator, dtype=torch.float64), -1)
    start_V = torch.log_softmax(torch.randn(V, generator=generator, dtype=torch.float64), -1)
    x_XL = torch.tensor(list(itertools.product(range(V), repeat=L)))
    log_p_X = start_V[x_XL[:, 0]] + step_VV[x_XL[:, :-1], x_XL[:, 1:]].sum(-1)
    masks_ML = torch.tensor(list(itertools.product([False, True], repeat=L)))
    return Chain(x_XL, log_p_X, masks_ML)


@pytest.fixture(scope="session")
def chi_square_p():
    """p-value of observed counts against expected ones (Wilson and Hilferty's normal approximation)."""

    def p_value(observed, expected) -> float:
        observed, expected = np.asarray(observed, float), np.asarray(expected, float)
        k = observed.size - 1
        x = ((observed - expected) ** 2 / expected).sum()
        z = ((x / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
        return 0.5 * math.erfc(z / math.sqrt(2))

    return p_value
