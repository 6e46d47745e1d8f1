"""From a config to a DeepSpeed engine that holds the model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from dlm_scale.config import resolve_batch
from dlm_scale.diffusion.modifiers import Judge
from dlm_scale.engine.checks import check_against_table, check_precision
from dlm_scale.engine.deepspeed_config import deepspeed_dict, zero_stage
from dlm_scale.engine.objectives import Objective, objective_of
from dlm_scale.engine.optimizer import AdamW, parameter_groups
from dlm_scale.engine.runtime import Runtime, import_deepspeed
from dlm_scale.engine.state_access import StateAccess
from dlm_scale.errors import UsageError
from dlm_scale.model.parameters import ParameterSpec, parameter_table
from dlm_scale.model.transformer import Transformer
from dlm_scale.parallel.layers import layers_of
from dlm_scale.parallel.mpu import unit_of


@dataclass(frozen=True)
class Trainer:
    """Everything that a train step needs and that does not change during a run."""

    config: Any
    runtime: Runtime
    vocabulary: Any
    engine: Any
    table: dict[str, ParameterSpec]
    state_access: StateAccess
    stage: int
    accumulation: int
    objective: Objective


def build_trainer(
    config: Any, runtime: Runtime, vocabulary: Any, judge: Judge | None = None, has_segments: bool = False
) -> Trainer:
    """Build model, optimizer and engine; the weights are not set yet (`StateAccess.fill`). Collective.

    judge: what `objective.judge` names (judge.py). has_segments: the data's rows consist of segments, whatever the
    config says: conversations do.
    """
    accumulation = resolve_batch(config, runtime.mesh.data_size)
    stage, ds_config = zero_stage(config), deepspeed_dict(config, accumulation)
    deepspeed = import_deepspeed()
    table = parameter_table(config.model, vocabulary)
    layers = layers_of(runtime.mesh, config.parallel.sequence_parallel)  # may import megatron: not under zero.Init
    with _zero_init(deepspeed, stage, ds_config, runtime):
        model = Transformer(config.model, vocabulary, layers, config.train.activation_checkpoint_every)
    check_against_table(model, table, runtime.mesh)
    if config.train.compile:
        _compile_blocks(model, stage, has_segments or config.data.has_segments)
    if stage < 3:
        model = model.to(runtime.device)
    groups = parameter_groups(model.named_parameters(), table, config.optimizer)
    optimizer = AdamW(groups, config.optimizer, config.train.ema_decay)
    unit = unit_of(runtime.mesh)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=unit)
    check_precision(engine.module, config.train.precision)
    access = StateAccess(engine, stage, table, runtime.mesh)
    return Trainer(config, runtime, vocabulary, engine, table, access, stage, accumulation,
                   objective_of(config, judge))


def _zero_init(deepspeed: Any, stage: int, ds_config: dict, runtime: Runtime) -> Any:
    """Under ZeRO-3 parameters are born partitioned, over the data-parallel group (never the whole world).

    Their type is left to the config: DeepSpeed 0.19.8 takes a `dtype` for bfloat16 where the CPU has no fp16 units.
    """
    if stage < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(data_parallel_group=runtime.mesh.data_group, config_dict_or_path=ds_config)


def _compile_blocks(model: Transformer, stage: int, has_segments: bool) -> None:
    """torch.compile, block by block: one graph serves all of them (two where the number of segments changes)."""
    if stage == 3:
        raise UsageError("train.compile=true: DeepSpeed gathers ZeRO-3 weights in hooks that break the graph of every "
                         "block; use deepspeed.zero_optimization.stage 0 to 2, or train.compile=false")
    for block in model.blocks:
        block.compile(dynamic=None if has_segments else False)
