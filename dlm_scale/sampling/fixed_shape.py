"""`predict` whose bits for a canvas do not depend on what else is in the batch.

A matrix product adds up in an order that may depend on the number of its rows and on where a row stands among them
(docs/LOG.md has the measurements). So canvases of one length go through the network in passes of one shape, and hidden
states through the head in blocks of one shape. That every place of such a shape gives the same bits is not assumed: a
pass full of the same canvas shows it, once a length. Where it does not hold, a pass takes fewer canvases, down to one:
that is always the same shape and place. A block of the head likewise, down to one row. What is left over at the end of
a batch goes through a smaller pass where copies of a canvas show that it gives the bits of a full one, else through a
full one, filled up.

Shapes: B canvases, R of one pass, L positions, D width, N candidates, H rows of a block of the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PassShape:
    """A pass takes as many canvases as fit into `tokens` positions, from 1 to `most_rows`; a block `head_rows` rows."""

    tokens: int
    most_rows: int
    head_rows: int

    def rows(self, length: int) -> int:
        return max(1, min(self.most_rows, self.tokens // length))


# head_rows: multiples of the 6, 8, 12, 14 or 16 rows that CPU kernels take at once leave no odd rest.
PASS_SHAPES = {"cpu": PassShape(512, 8, 48), "cuda": PassShape(1 << 15, 256, 256)}


@dataclass
class FixedShapePredict:
    """`Predict` (predict.py) of a model, see above. Counts the canvases that passes took and those that filled up."""

    model: Any
    mask_id: int
    device: torch.device
    shape: PassShape
    num_rows: int = 0
    num_copies: int = 0
    rows_by_length: dict[int, int] = field(default_factory=dict)
    is_as_full: dict[tuple[int, int], bool] = field(default_factory=dict)
    head_rows: dict[str, int] = field(default_factory=dict)  # of a block, for each kind of reading

    @torch.no_grad()
    def __call__(self, x_BL: Tensor, rows_N: Tensor, attention: Any = None) -> Tensor:
        """Float32 log-probabilities [N, V] at flat positions, ascending."""
        return self._log_probs(*self._hidden(x_BL, rows_N, attention))

    @property
    def critique(self) -> "Callable | None":
        return self._critique if self.model.head.critic is not None else None

    @property
    def local(self) -> "Callable | None":
        return self._local if self.model.head.sampler is not None else None

    @torch.no_grad()
    def _critique(self, x_BL: Tensor, rows_N: Tensor) -> Tensor:
        view, hidden_ND = self._hidden(x_BL, rows_N, None)
        return self._in_blocks("critic", lambda hidden: view.over(hidden).critic(), hidden_ND)

    @torch.no_grad()
    def _local(self, x_BL: Tensor, rows_N: Tensor) -> tuple[Tensor, Callable]:
        view, hidden_ND = self._hidden(x_BL, rows_N, None)

        def again(which_M: Tensor, left_M: Tensor, right_M: Tensor) -> Tensor:
            def read(hidden: Tensor, left: Tensor, right: Tensor) -> Tensor:
                return view.over(hidden).local(left, right).log_probs()

            return self._in_blocks("local", read, hidden_ND[which_M], left_M, right_M)

        return self._log_probs(view, hidden_ND), torch.no_grad()(again)

    def _hidden(self, x_BL: Tensor, rows_N: Tensor, attention: Any) -> tuple[Any, Tensor]:
        """The head's view, and the hidden states [N, D] at flat positions, ascending."""
        x_BL, rows_N = x_BL.to(self.device), rows_N.to(self.device)
        length = x_BL.shape[1]
        most = self._most_rows(x_BL, attention)
        bounds = torch.arange(most, len(x_BL) + most, most, device=self.device) * length
        counts = torch.searchsorted(rows_N, bounds).diff(prepend=rows_N.new_zeros(1)).tolist()
        hidden = []
        for number, part_N in enumerate(rows_N.split(counts)):
            part = x_BL[number * most : (number + 1) * most]
            rows = self._rows_for(len(part), part, attention)
            view = self._trunk(_filled(part, rows), attention)
            hidden.append(view.hidden_ND[part_N - number * most * length])
            self.num_rows += rows
            self.num_copies += rows - len(part)
        return view, torch.cat(hidden)

    def _trunk(self, x_RL: Tensor, attention: Any) -> Any:
        """The head's view of the final hidden states at all positions."""
        every_N = torch.arange(x_RL.numel(), device=self.device)
        m_R = (x_RL == self.mask_id).float().mean(dim=1)
        return self.model(x_RL, m_B=m_R, rows_N=every_N, readout=lambda view: view, attention=attention)

    def _log_probs(self, view: Any, hidden_ND: Tensor) -> Tensor:
        return self._in_blocks("log_probs", lambda hidden: view.over(hidden).log_probs(), hidden_ND)

    def _in_blocks(self, kind: str, read: Callable, *inputs: Tensor) -> Tensor:
        """`read` of the inputs [N, ...], a block of rows after the other."""
        if kind not in self.head_rows:
            copies = read(*(_filled(given[:1], self.shape.head_rows) for given in inputs))
            self.head_rows[kind] = self.shape.head_rows if _all_equal(copies) else 1
        rows = self.head_rows[kind]
        blocks = zip(*(given.split(rows) for given in inputs))
        return torch.cat([read(*(_filled(part, rows) for part in block))[: len(block[0])] for block in blocks])

    def _most_rows(self, x_BL: Tensor, attention: Any) -> int:
        """Canvases of a full pass at this length: the most, up to what the shape says, whose places all agree."""
        length = x_BL.shape[1]
        if length not in self.rows_by_length:
            descending = range(self.shape.rows(length), 1, -1)
            agreeing = (rows for rows in descending if _all_equal(self._copies(x_BL, rows, attention)))
            self.rows_by_length[length] = next(agreeing, 1)
        return self.rows_by_length[length]

    def _rows_for(self, count: int, x_BL: Tensor, attention: Any) -> int:
        """Canvases of a pass for the last `count` of them: the fewest that give the bits of a full pass."""
        length, most = x_BL.shape[1], self.rows_by_length[x_BL.shape[1]]
        for rows in range(count, most):
            if (length, rows) not in self.is_as_full:
                full, part = (self._copies(x_BL, number, attention) for number in (most, rows))
                self.is_as_full[length, rows] = _all_equal(torch.cat([full[:1], part]))
            if self.is_as_full[length, rows]:
                return rows
        return most

    def _copies(self, x_BL: Tensor, rows: int, attention: Any) -> Tensor:
        """Hidden states [rows, L D] of a pass full of the first canvas."""
        return self._trunk(x_BL[:1].repeat(rows, 1), attention).hidden_ND.view(rows, -1)


def _filled(x: Tensor, rows: int) -> Tensor:
    """Copies of the first row below, up to `rows`; always in memory of its own."""
    return torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])])


def _all_equal(x: Tensor) -> bool:
    """Whether all rows have the same bits."""
    return bool((x == x[:1]).all())
