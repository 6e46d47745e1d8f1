"""`dlm train`, `deepspeed --module dlm_scale.train`, `torchrun -m dlm_scale.train`: one program.

Cheap checks come first: a wrong config, dataset or run folder is refused before torch is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dlm_scale.cli import launched_main
from dlm_scale.errors import UsageError
from dlm_scale.parallel.dist_env import dist_env, is_first_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, e.g. configs/shakespeare_char_tiny.yaml")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="section.key=value ...")


def run(args: argparse.Namespace) -> None:
    """Check everything that is cheap to check, then train."""
    from dlm_scale.config import load_config, resolve_batch
    from dlm_scale.parallel.mesh import check_layout

    config, world = load_config(args.config, args.overrides), dist_env().world_size
    check_layout(world, config.parallel.tensor_parallel_size)
    resolve_batch(config, world // config.parallel.tensor_parallel_size)
    data, validation = open_datasets(config)
    checkpoint = find_resume_point(config, data)
    train(config, data, validation, checkpoint)


def open_datasets(config: Any) -> tuple[Any, Any]:
    """Training and validation data (or None); both must be of one tokenizer."""
    from dlm_scale.data.loader import ValidationData, open_data, require_same_tokenizer

    source = f"synthetic:{config.data.synthetic_vocab_size}" if config.data.is_synthetic else config.data.train
    data = open_data(source, config.model.seq_len, config.train.seed)
    if config.data.validation is None:
        return data, None
    validation = ValidationData(config.data.validation, config.model.seq_len, config.train.eval_rows)
    require_same_tokenizer(data.tokenizer_meta, validation.meta, "data.train", "data.validation")
    return data, validation


def find_resume_point(config: Any, data: Any) -> Any:
    """The newest good checkpoint of train.out, checked against this config and data; None to start anew."""
    from dlm_scale.checkpoint.folders import find_checkpoint, list_checkpoints
    from dlm_scale.engine.run_folder import prepare_folder

    out = Path(config.train.out)
    has_checkpoint = bool(list_checkpoints(out))
    prepare_folder(out, config.train.resume, has_checkpoint)
    if not has_checkpoint:
        return None
    path, skipped = find_checkpoint(out)
    if is_first_rank():
        for message in skipped:
            print(f"dlm: warning: {message}", file=sys.stderr)
    from dlm_scale.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(path, verify=False)  # find_checkpoint has just hashed it
    check_same_run(checkpoint, config, data)
    return checkpoint


def check_same_run(checkpoint: Any, config: Any, data: Any) -> None:
    """Raises UsageError where the config or the tokens would change the result of the run in train.out."""
    from dlm_scale.config import config_difference, config_from_text, is_result_neutral

    old = config_from_text(checkpoint.document("config.yaml").decode(), f"{checkpoint.path}/config.yaml")
    changed = [f"{key}: {a} -> {b}" for key, (a, b) in config_difference(old, config).items()
               if not is_result_neutral(key) and key != "data.train"]  # data is compared by content
    if checkpoint.state["data_fingerprint"] != data.fingerprint:
        changed.append("data.train: other tokens, tokenizer or weights")
    if changed:
        raise UsageError(f"train.out={config.train.out} holds a run with another config ({'; '.join(changed)}): going "
                         "on would mix two runs; restore these keys, or choose another train.out")


def train(config: Any, data: Any, validation: Any, checkpoint: Any) -> None:
    """Join the world, build the engine, run the loop, leave the run folder complete."""
    from dlm_scale.engine.build import build_trainer
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.engine.saving import restore, start_fresh
    from dlm_scale.engine.session import Session

    runtime = start_runtime(config.train.device, config.parallel.tensor_parallel_size)
    session = Session(config, runtime, data)
    trainer = build_trainer(config, runtime, data.vocabulary)
    state = restore(trainer, checkpoint) if checkpoint else start_fresh(trainer)
    session.run(trainer, data, validation, state, checkpoint)
    stop_runtime()


def main(arguments: list[str] | None = None) -> None:
    """`dlm train CONFIG overrides`. Raises UsageError."""
    parser = argparse.ArgumentParser(prog="dlm train", description="Train a diffusion language model.")
    add_arguments(parser)
    run(parser.parse_args(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    launched_main("train")
