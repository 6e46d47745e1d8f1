"""Our config to DeepSpeed's dict: one direction, numbers only, every quantity from its one owner."""

from __future__ import annotations

import copy
from typing import Any


def zero_stage(config: Any) -> int:
    """The ZeRO stage that the `deepspeed:` section asks for (0 when it does not say)."""
    return int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))


def deepspeed_dict(config: Any, accumulation: int) -> dict[str, Any]:
    """The dict given to DeepSpeed. Norm and clipping are ours (engine/gradients.py): DeepSpeed is told not to clip,
    since it clips at 1.0 when nothing is said."""
    stage, bf16 = zero_stage(config), config.train.precision == "bf16"
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    if bf16:
        generated["bf16"] = {"enabled": True}
        if stage:
            generated["data_types"] = {"grad_accum_dtype": "fp32"}
    passed_through = copy.deepcopy(config.deepspeed)
    generated["zero_optimization"] |= passed_through.pop("zero_optimization", {})
    return generated | passed_through
