"""The arguments of `dlm prepare` and `dlm data`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Tokenize a text into OUT/train.{bin,idx}, OUT/val.{bin,idx} and OUT/meta.json."
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="file, folder, glob, built-in corpus (stdlib, grammar) or hf:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="byte, char, gpt2, a GPT-2 .tiktoken ranks file, or a tokenizer.json"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share of validation (default 0.1)")
    parser.add_argument("--text_key", default="text", help="key or column of the text in JSON Lines, Parquet, hf:")
    parser.add_argument("--max_documents", type=int, default=0, help="stop after so many documents (0: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset in OUT")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare, then say what was made and what to do next. Raises UsageError."""
    from dlm_scale.data.prepare import prepare

    meta = prepare(
        args.source,
        args.tokenizer,
        args.out,
        val_fraction=args.val_fraction,
        text_key=args.text_key,
        max_documents=args.max_documents,
        overwrite=args.overwrite,
    )
    for name, split in meta.splits.items():
        print(f"{args.out}/{name}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} text bytes")
    print(f"tokenizer {meta.tokenizer.kind}: {meta.vocab_size} ids, the mask is {meta.mask_id}")
    print(f"train on it with data.train={args.out}/train data.validation={args.out}/val")
    return 0


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check or show an indexed dataset. PREFIX is the path without .bin and .idx, as in D/train."
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="verify|stats|head")
    texts = {
        "verify": "check files, hashes per 64 MiB, every id, and the tokenizer",
        "stats": "counts, entropies and document lengths",
        "head": "the first documents, or windows, as text",
    }
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for sub in made.values():
        sub.add_argument("prefix", metavar="PREFIX")
    made["head"].add_argument("--count", type=int, default=3, help="how many (default 3)")
    made["head"].add_argument("--seq_len", type=int, default=0, help="show windows of so many tokens (0: documents)")
    made["head"].add_argument("--max_characters", type=int, default=400, help="of each (default 400)")


def run_data(args: argparse.Namespace) -> int:
    """Run `dlm data ...`. Raises UsageError where the dataset is not sound."""
    from dlm_scale.data import verify

    if args.data_command == "verify":
        print(verify.verify(args.prefix))
    elif args.data_command == "stats":
        for key, value in verify.stats(args.prefix).items():
            print(f"{key}: {value}")
    else:
        for number, text in enumerate(verify.head(args.prefix, args.count, args.seq_len, args.max_characters)):
            print(f"--- {number}\n{text}")
    return 0
