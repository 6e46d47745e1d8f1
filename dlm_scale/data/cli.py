"""The arguments of `dlm data`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check or show an indexed dataset, or import one. PREFIX is the path without .bin and .idx, as in D/train."
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="verify|stats|head|import")
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
    _add_import_arguments(commands.add_parser("import", help="ids that nanoGPT or datatrove made"))


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Ids that another program made, as an indexed dataset."
    parser.add_argument("source", metavar="SRC", help="nanoGPT's .bin or its folder, or datatrove's .ds or its folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokenizer", required=True, help="the one that made the ids, as for dlm prepare (not char)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="where SRC has no validation (default 0.1)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset in OUT")


def run_data(args: argparse.Namespace) -> int:
    """Run `dlm data ...`. Raises UsageError where the dataset is not sound."""
    if args.data_command == "import":
        return _import(args)
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


def _import(args: argparse.Namespace) -> int:
    from dlm_scale.data.convert import import_ids
    from dlm_scale.data.verify import summary

    options = {"val_fraction": args.val_fraction, "workers": args.workers, "overwrite": args.overwrite}
    print(summary(import_ids(args.source, args.tokenizer, args.out, **options), args.out))
    return 0
