"""Where a run stands. Everything random is a pure function of the seed and of these two numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainState:
    """`step` optimizer steps done; `samples` global samples consumed since the run began."""

    step: int = 0
    samples: int = 0

    def advanced(self, global_batch_size: int) -> TrainState:
        return TrainState(self.step + 1, self.samples + global_batch_size)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
