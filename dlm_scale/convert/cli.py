"""`python tools/convert_checkpoint.py SRC DST --to hf|dlm|safetensors`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlm_scale.errors import UsageError

TARGETS = {"hf": "a Hugging Face folder", "dlm": "a checkpoint of ours", "safetensors": "one file NAME.safetensors"}
MODES = "fp32", "bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        type=Path,
        help="a run or checkpoint of ours, a Hugging Face folder, or a DeepSpeed checkpoint",
    )
    add("target", metavar="DST", type=Path, help="what to make; must not exist")
    add(
        "--to",
        required=True,
        choices=list(TARGETS),
        help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()),
    )
    add(
        "--family",
        default="dlm_scale",
        help="of --to hf: dlm_scale (our own class; default), or another family by name",
    )
    add("--dtype", default=MODES[0], choices=MODES, help="of the written weights (default: %(default)s)")
    add(
        "--weights",
        choices=["ema", "param"],
        help="moving average or raw weights (default: ema if there is one; for --to dlm"
        " everything, optimizer included)",
    )
    add("--ranks", type=int, default=1, help="of --to dlm: files to write, as by so many ranks (default: %(default)s)")
    add("--tensor_parallel_size", type=int, default=1, help="of --to dlm: ranks to a model (default: %(default)s)")
    add("--max_shard_gb", type=float, default=4.0, help="of --to hf: largest file (default: %(default)s)")
    add("--config", type=Path, help="config.json, or YAML of ours, that a DeepSpeed checkpoint was trained with")
    add("--mask_id", type=int, help="id of the mask, where SRC has neither a tokenizer nor a config.json that says it")
    add("--dry_run", action="store_true", help="print where each tensor comes from, and write nothing")
    add("--push_to_hub", metavar="REPOSITORY", help="of --to hf: upload DST with huggingface_hub when it is done")


def run(args: argparse.Namespace) -> int:
    """Convert. Raises UsageError; then DST does not exist."""
    _check(args)
    from dlm_scale.convert.deepspeed import deepspeed_store, is_deepspeed
    from dlm_scale.convert.source import open_model
    from dlm_scale.convert.targets import write_store_target
    from dlm_scale.convert.writing import refuse_existing

    if not args.dry_run:
        refuse_existing(args.target)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    if args.to == "safetensors" and args.config is None and is_deepspeed(args.source):
        store = deepspeed_store(args.source)
        if args.dry_run:
            print("\n".join(f"{name} {list(stored.shape)}" for name, stored in store.tensors.items()))
        else:
            write_store_target(store, args.target, dtype=dtype, say=print)
        return _done(args)
    model = open_model(args.source, args.config, args.mask_id)
    slot = args.weights or ("ema" if "ema" in model.slots else "param")
    if slot not in model.slots:
        raise UsageError(
            f"{model.path} has no {slot} weights, only {', '.join(model.slots)}: leave out --weights {slot}"
        )
    count = sum(spec.numel for spec in model.table.values())
    print(f"{model.path} ({model.family}): {count:,} parameters, weights {slot}")
    for note in model.notes:
        print(f"note: {note}")
    if args.dry_run:
        return _print_mapping(args, model, dtype, slot)
    _write(args, model, dtype, slot)
    return _done(args)


def _write(args: argparse.Namespace, model, dtype: str, slot: str) -> None:
    from dlm_scale.convert.targets import write_checkpoint_target, write_file_target, write_hf

    if args.to == "hf":
        write_hf(model, args.target, dtype=dtype, slot=slot, family=args.family, say=print,
                 max_shard_bytes=int(args.max_shard_gb * 1e9))  # fmt: skip
    elif args.to == "dlm":
        write_checkpoint_target(model, args.target, slot=args.weights, ranks=args.ranks, say=print,
                                tensor_size=args.tensor_parallel_size)  # fmt: skip
    else:
        write_file_target(model, args.target, dtype=dtype, slot=slot, say=print)


def _print_mapping(args: argparse.Namespace, model, dtype: str, slot: str) -> int:
    from dlm_scale.convert.targets import hf_config, hf_entries

    print("\n".join(model.mapping or (f"{name} {list(spec.shape)}" for name, spec in model.table.items())))
    if args.to == "hf":
        hf_config(model, args.family, dtype)
        print(
            "\n".join(
                f"-> {entry.key} {list(entry.shape)} {dtype}" for entry in hf_entries(model, args.family, dtype, slot)
            )
        )
    return 0


def _check(args: argparse.Namespace) -> None:
    from dlm_scale.convert.families import FAMILIES

    if args.family not in FAMILIES:
        raise UsageError(f"--family {args.family!r} is not known; known are {', '.join(FAMILIES)}")
    only_for = [("family", "hf", "dlm_scale"), ("max_shard_gb", "hf", 4.0), ("push_to_hub", "hf", None),
                ("ranks", "dlm", 1), ("tensor_parallel_size", "dlm", 1)]  # fmt: skip
    for name, target, default in only_for:
        if args.to != target and getattr(args, name) != default:
            raise UsageError(f"--{name} is for --to {target}, not --to {args.to}")
    if args.to == "dlm" and args.dtype != "fp32":
        raise UsageError("--dtype bf16 is not for --to dlm: a checkpoint of ours holds float32 master weights")
    if args.max_shard_gb <= 0:
        raise UsageError(f"--max_shard_gb is {args.max_shard_gb}: give a size above 0")


def _done(args: argparse.Namespace) -> int:
    if args.dry_run:
        return 0
    print(f"written and verified: {args.target}")
    if args.push_to_hub:
        from dlm_scale.convert.push import push_folder

        print(f"uploaded: {push_folder(args.target, args.push_to_hub)}")
    return 0
