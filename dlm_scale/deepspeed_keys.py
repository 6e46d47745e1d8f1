"""Names and value types of DeepSpeed 0.19.8's config, so that a misspelt key is refused before torch is imported.

DeepSpeed itself accepts any top-level key in silence. `PASSED` is what goes through to it as it stands, `OWNED` what
another key of ours decides. A test compares the zero_optimization part with DeepSpeed's own pydantic models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

Tree = Mapping[str, Any]  # name -> type of the value, or the tree below it


def _names(kind: type, names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), kind)


_OFFLOAD_PARAM = (
    _names(str, "device nvme_path") | _names(int, "buffer_count buffer_size max_in_cpu") | _names(bool, "pin_memory")
)
_OFFLOAD_OPTIMIZER = (
    _names(str, "device nvme_path")
    | _names(int, "buffer_count")
    | _names(float, "ratio cpuadam_cores_perc")
    | _names(bool, "pin_memory pipeline_read pipeline_write fast_init super_offload")
)
_ZENFLOW = (
    _names(float, "topk_ratio auto_ratio pt_reserved_cores_perc")
    | _names(int, "select_interval update_interval full_warm_up_rounds steps_per_epoch")
    | _names(bool, "overlap_step offload")
    | _names(str, "select_strategy")
)
ZERO_OPTIMIZATION: Tree = (
    _names(
        bool,
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm"
        " compute_grad_norm load_from_fp32_weights stage3_gather_16bit_weights_on_model_save"
        " stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters"
        " round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights"
        " zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply"
        " log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
    )
    | _names(
        int,
        "stage reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size"
        " stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters"
        " stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size",
    )
    | {
        "offload_param": _OFFLOAD_PARAM,
        "offload_optimizer": _OFFLOAD_OPTIMIZER,
        "zenflow": _ZENFLOW,
        "leaf_module": _names(list, "classes names name_suffixes"),
    }
)
PASSED: Tree = (
    _names(
        bool,
        "zero_force_ds_cpu_optimizer prescale_gradients disable_allgather disable_python_gc dump_state"
        " wall_clock_breakdown memory_breakdown",
    )
    | _names(str, "communication_data_type seq_parallel_communication_data_type log_level")
    | _names(float, "gradient_predivide_factor")
    | {
        "zero_optimization": ZERO_OPTIMIZATION,
        "aio": _names(int, "block_size queue_depth intra_op_parallelism")
        | _names(bool, "single_submit overlap_events use_gds"),
        "comms_logger": _names(bool, "enabled verbose prof_all debug") | {"prof_ops": list},
        "flops_profiler": _names(bool, "enabled detailed")
        | _names(int, "profile_step module_depth top_modules")
        | {"recompute_fwd_factor": float, "output_file": str},
        "tensorboard": {"enabled": bool, "output_path": str, "job_name": str},
        "csv_monitor": {"enabled": bool, "output_path": str, "job_name": str},
        "timers": {"throughput": _names(bool, "enabled synchronized")},
    }
)
OWNED: Mapping[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clip",
    "gradient_allreduce_op": "diffusion.weighting",
    "optimizer": "optimizer.name",
    "zero_allow_untested_optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "steps_per_print": "train.log_every",
    "activation_checkpointing": "train.activation_checkpoint_every",
    "wandb": "train.wandb",
    "checkpoint": "train.save_every",
    "compile": "train.compile",
    "tensor_parallel": "parallel.tensor_parallel_size",
    "dataloader_drop_last": "data.train",
    "data_efficiency": "data.train",
}
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
}


def closest(name: str, valid: list[str]) -> str | None:
    """The valid name that `name` most likely stands for, or None."""
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_key_text(name: str, parent: str, valid: list[str], hint: str | None = None) -> str:
    """What to say of an unknown key: the likely one (`hint` where the caller knows better) and the valid ones."""
    guess = hint or next((f"{parent}.{m}" for m in [closest(name, valid)] if m), None)
    listed = difflib.get_close_matches(name, valid, n=12, cutoff=0.0) if len(valid) > 30 else sorted(valid)
    more = f" and {len(valid) - len(listed)} more" if len(listed) < len(valid) else ""
    question = f"; did you mean {guess}?" if guess else "."
    return f"is not a known key{question} Valid in {parent or 'a config'}: {', '.join(listed)}{more}"


def _problem_of_value(value: Any, kind: type) -> str | None:
    if value == "auto":
        return '"auto" is not resolved outside other frameworks: give the value, or leave the key out'
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        return f"is {value!r:.60}: expected {_EXPECTED[kind]}"
    return None


def _problems_below(section: Mapping[str, Any], tree: Tree, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if prefix == "deepspeed" and name in OWNED:
            yield key, f"is owned by {OWNED[name]}: set it there and take {key} out"
        elif name not in tree:
            valid = [*tree, *OWNED] if prefix == "deepspeed" else list(tree)
            guess = closest(name, valid)
            hint = f"{OWNED[guess]} (it owns {prefix}.{guess})" if guess in OWNED and guess not in tree else None
            yield key, unknown_key_text(name, prefix, list(tree), hint)
        elif isinstance(tree[name], type):
            if text := _problem_of_value(value, tree[name]):
                yield key, text
        elif isinstance(value, Mapping):
            yield from _problems_below(value, tree[name], key)
        else:
            yield key, f"is {value!r:.60}: expected a mapping of keys to values"


def deepspeed_problems(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, what is wrong and what to do) for everything in the `deepspeed:` section that must be refused."""
    problems = list(_problems_below(section, PASSED, "deepspeed"))
    zero = section.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if isinstance(stage, int) and not isinstance(stage, bool) and stage not in range(4):
        problems.append(("deepspeed.zero_optimization.stage", f"is {stage}: expected 0, 1, 2 or 3"))
    return problems
