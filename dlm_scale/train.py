"""`dlm train`, `deepspeed --module dlm_scale.train`, `torchrun -m dlm_scale.train`: one program.

Cheap checks come first: a wrong config, dataset or run folder is refused before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dlm_scale.cli import launched_main, note_refusal
from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import dist_env, is_first_rank


COLLECTIVES_WAIT_LONGER_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, e.g. configs/shakespeare_char_tiny.yaml")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="section.key=value ...")


def check(config_path: str, overrides: list[str], world: int) -> tuple[Any, Any, Any]:
    """Everything that is cheap to check for a run of `world` ranks: (config, training data, validation data or None).

    Makes the run folder. Raises UsageError.
    """
    from dlm_scale.config import load_config, resolve_batch
    from dlm_scale.config_checks import config_warnings
    from dlm_scale.parallel.mesh import check_layout

    config = load_config(config_path, overrides)
    check_layout(world, config.parallel.tensor_parallel_size)
    resolve_batch(config, world // config.parallel.tensor_parallel_size)
    for message in config_warnings(config):
        say_on_first_rank(message)
    data, validation = open_datasets(config)
    config = with_num_steps(config, data.vocabulary)
    check_resume_point(config, data)
    return config, data, validation


def run(args: argparse.Namespace) -> int:
    """Check everything that is cheap to check, then train; returns the exit code."""
    world = dist_env().world_size
    config, data, validation = check(args.config, args.overrides, world)
    from dlm_scale.engine.session import RunFailed

    try:
        train(config, data, validation)
    except RunFailed as failure:
        if failure.code == 2:
            note_refusal(str(failure))
        return _leave(failure.code, world)
    return 0


def _leave(code: int, world_size: int) -> int:
    """End now: what waits for the other ranks when a process ends may wait for ever."""
    if world_size > 1:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


def open_datasets(config: Any) -> tuple[Any, Any]:
    """Training and validation data (or None); both must be of one tokenizer."""
    from dlm_scale.data.edit_tokens import edit_tokens
    from dlm_scale.data.loader import ValidationData, open_data, require_same_tokenizer

    source = f"synthetic:{config.data.synthetic_vocab_size}" if config.data.is_synthetic else config.data.train
    how = {key: getattr(config.data, key) for key in ("packing", "order", "answer_padding")}
    data = open_data(source, config.model.seq_len, config.train.seed, **how)
    if config.objective.kind == "autoregressive" and is_chat(data):
        raise UsageError("objective.kind=autoregressive: data.train holds conversations, which only diffusion takes so far; "
                         "give text, or leave the objective out")
    if config.diffusion.edit_stage_start < 1:
        data = replace(data, edits=edit_tokens(data, config.diffusion.insertion_corruption,
                                               config.diffusion.deletion_corruption))
    if config.data.validation is None:
        return data, None
    validation = ValidationData(config.data.validation, config.model.seq_len, config.train.eval_rows)
    require_same_tokenizer(data.tokenizer_meta, validation.meta, "data.train", "data.validation")
    return data, validation


def with_num_steps(config: Any, vocabulary: Any) -> Any:
    """The config with train.num_steps where train.target_param_data_ratio says it: the fewest steps that train on so
    many tokens a parameter. The parameters, tables included, are known once the data, and so the vocabulary, are."""
    from dlm_scale.model.parameters import count_parameters

    ratio = config.train.target_param_data_ratio
    if ratio is None:
        return config
    tokens_a_step = config.train.global_batch_size * config.model.seq_len
    steps = math.ceil(ratio * count_parameters(config.model, vocabulary) / tokens_a_step)
    train = config.train.model_copy(update={"target_param_data_ratio": None, "num_steps": steps})
    return config.model_copy(update={"train": train})


def is_chat(data: Any) -> bool:
    """Whether the training data are conversations; synthetic ones are not."""
    return getattr(data.tokenizer_meta, "is_chat", False)


def check_resume_point(config: Any, data: Any) -> None:
    """Make train.out, and refuse a run that does not fit what is there; the tensors' contents are not checked here."""
    from dlm_scale.checkpoint.folders import inspect_checkpoint, list_checkpoints
    from dlm_scale.engine.run_folder import prepare_folder

    out = Path(config.train.out)
    prepare_folder(out, config.train.resume, bool(list_checkpoints(out) or config.train.branch_from))
    find_judge(config, data, partial(inspect_checkpoint, with_tensors=False))
    if find_resume_point(config, data, partial(inspect_checkpoint, with_tensors=False)) is None:
        find_origin(config, data, partial(inspect_checkpoint, with_tensors=False))


def find_resume_point(config: Any, data: Any, inspect: Callable, say: Callable[[str], None] = lambda text: None) -> Any:
    """The newest checkpoint of train.out, or else that of train.branch_from, that `inspect` finds good, checked against
    this config and data; None to start anew. `say` is told why newer ones are passed over."""
    from dlm_scale.checkpoint.folders import find_checkpoint, list_checkpoints
    from dlm_scale.checkpoint.reader import open_checkpoint

    out = Path(config.train.out)
    if not list_checkpoints(out):
        return find_branch_point(config, data, inspect) if config.train.branch_from else None
    path, skipped = find_checkpoint(out, inspect)
    for message in skipped:
        say(message)
    checkpoint = open_checkpoint(path, verify=False)  # inspected just now
    check_same_run(checkpoint, config, data)
    return checkpoint


def say_on_first_rank(message: str) -> None:
    if is_first_rank():
        print(f"dlm: warning: {message}", file=sys.stderr)


def find_branch_point(config: Any, data: Any, inspect: Callable) -> Any:
    """The checkpoint that train.branch_from names. Raises UsageError where its state does not fit this config."""
    from dlm_scale.checkpoint.folders import find_checkpoint
    from dlm_scale.checkpoint.reader import open_checkpoint
    from dlm_scale.config import config_from_text
    from dlm_scale.config_compare import config_difference
    from dlm_scale.data.meta import TOKENIZER_DOCUMENT

    path, _ = find_checkpoint(Path(config.train.branch_from), inspect)
    checkpoint = open_checkpoint(path, verify=False)  # inspected just now
    old = config_from_text(checkpoint.document("config.yaml").decode(), f"{path}/config.yaml")
    wrong = [f"{key}: {a} -> {b}" for key, (a, b) in config_difference(old, config).items()
             if key.startswith("model.") and key != "model.init_from" or key == "optimizer.name"]
    tokenizer = json.loads(json.dumps(data.tokenizer_meta.tokenizer_dict()))
    if json.loads(checkpoint.document(TOKENIZER_DOCUMENT)) != tokenizer:
        wrong.append("data.train: another tokenizer")
    if config.train.num_steps <= checkpoint.step:
        wrong.append(f"train.num_steps={config.train.num_steps} is not beyond its step {checkpoint.step}")
    if wrong:
        raise UsageError(f"train.branch_from={config.train.branch_from}: the state of {path} cannot go on under this "
                         f"config ({'; '.join(wrong)}): restore these keys, or start a run without train.branch_from")
    return checkpoint


def find_origin(config: Any, data: Any, inspect: Callable) -> Any:
    """The weights that model.init_from names; None without it. Raises UsageError where they do not fit the model."""
    if config.model.init_from is None:
        return None
    from dlm_scale.checkpoint.folders import find_checkpoint
    from dlm_scale.engine.warm_start import open_origin

    path, _ = find_checkpoint(Path(config.model.init_from), inspect)
    return open_origin(path, config, data)


def find_judge(config: Any, data: Any, inspect: Callable) -> Any:
    """The checkpoint of the scorer that objective.judge names; None without it. Raises UsageError where it cannot judge
    this run."""
    if config.objective.judge is None:
        return None
    from dlm_scale.checkpoint.folders import find_checkpoint
    from dlm_scale.engine.judge import check_judge

    path, _ = find_checkpoint(Path(config.objective.judge), inspect)
    return check_judge(path, config, data.tokenizer_meta)


def check_same_run(checkpoint: Any, config: Any, data: Any) -> None:
    """Raises UsageError where the config or the tokens would change the result of the run in train.out."""
    from dlm_scale.config import config_from_text
    from dlm_scale.config_compare import config_difference, is_result_neutral

    old = config_from_text(checkpoint.document("config.yaml").decode(), f"{checkpoint.path}/config.yaml")
    changed = [f"{key}: {a} -> {b}" for key, (a, b) in config_difference(old, config).items()
               if not is_result_neutral(key) and key != "data.train"]  # data is compared by content
    if checkpoint.state["data_fingerprint"] != data.fingerprint:
        changed.append("data.train: other tokens, tokenizer or weights")
    if changed:
        raise UsageError(f"train.out={config.train.out} holds a run with another config ({'; '.join(changed)}): going "
                         "on would mix two runs; restore these keys, or choose another train.out")


def train(config: Any, data: Any, validation: Any) -> None:
    """Join the world, build the engine, run the loop, leave the run folder complete.

    Raises UsageError where another job has the folder, or no checkpoint of it is good, and RunFailed, which has been
    said, for whatever ends the run.
    """
    from dlm_scale.checkpoint.folders import inspect_together
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.judge import load_judge
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.engine.saving import all_gather_object, restore, start_fresh
    from dlm_scale.engine.session import Session
    from dlm_scale.parallel.roll_call import naming_lost_ranks

    # The watchdog, which names the rank that hangs, comes before the time limit of the collectives.
    timeout = config.train.hang_timeout_seconds + COLLECTIVES_WAIT_LONGER_SECONDS
    runtime = start_runtime(config.train.device, config.parallel.tensor_parallel_size, timeout)
    inspect = inspect_together(runtime.env.rank, runtime.env.world_size, all_gather_object)
    checkpoint = find_resume_point(config, data, inspect, say_on_first_rank)
    origin = None if checkpoint else find_origin(config, data, inspect)
    scorer = find_judge(config, data, inspect)
    session = Session(config, runtime, data)
    try:
        judge = scorer and load_judge(scorer, data.vocabulary, runtime.device, config.train.precision)
        trainer = build_trainer(config, runtime, data.vocabulary, judge, is_chat(data))
        state = restore(trainer, checkpoint) if checkpoint else start_fresh(trainer, origin)
        with naming_lost_ranks(runtime.env):
            session.run(trainer, data, validation, state, checkpoint)
    except Exception as error:
        raise session.fail(error) from error
    stop_runtime()


def main(arguments: list[str] | None = None) -> int:
    """`dlm train CONFIG overrides`. Raises UsageError."""
    parser = argparse.ArgumentParser(prog="dlm train", description="Train a diffusion language model.")
    add_arguments(parser)
    return run(parser.parse_args(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    launched_main("train")
