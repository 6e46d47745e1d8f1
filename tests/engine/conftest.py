import pytest

import deepspeed  # noqa: F401  (once, before any fork; so are the next)
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401  (the first optimizer of a process imports these two: 2 CPU seconds a fork)
import torch._inductor.compile_fx  # noqa: F401

from dlm_scale.data.prepare import prepare


@pytest.fixture(scope="session")
def grammar(tmp_path_factory):
    """The `grammar` corpus as characters: D/train, D/val."""
    out = tmp_path_factory.mktemp("grammar")
    prepare("grammar", "char", out, overwrite=True)
    return out


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, grammar):
    """A small run on it; tests change it by overrides."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(f"""
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, seq_len: 16}}
data: {{train: {grammar}/train, validation: {grammar}/val}}
train: {{global_batch_size: 8, micro_batch_size: 4, num_steps: 12, precision: fp32, log_every: 1, eval_every: 6,
         eval_rows: 8, eval_draws: 2, save_every: 6, out: unset, ema_decay: 0.9, seed: 3}}
optimizer: {{learning_rate: 3e-3, eps: 1e-5, warmup_steps: 4, gradient_clip: 0.5}}
deepspeed: {{zero_optimization: {{stage: 1}}}}
""")
    return path
