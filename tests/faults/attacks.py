"""Malicious files of more than thirty kinds, each where a reader of some kind would come upon it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.hostile import (
    WRAPPINGS,
    Attack,
    Scene,
    forged,
    in_data,
    pickle_exec,
    pickle_of,
    planted,
    reseal,
    source_file,
    tar_of,
    text,
    torch_file,
)

DEEP = "[" * 100_000
HUGE = "9" * 6000


def _planted_pickles() -> list[Attack]:
    """Under the names that training programs, DeepSpeed among them, load; with any reader's favourite wrapping."""
    names = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "optimizer.pt", "scheduler.pt", "training_args.bin",
             "rng_state_0.pth", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "tokenizer.pkl",
             "state.npy", "metadata.npz", "__0_0.distcp", ".metadata", "dataset.cache", "model.ckpt", "model.joblib")
    wrappings = list(WRAPPINGS.items())
    return [Attack(f"{how} as {name}", planted(name, wrap), "checkpoint")
            for i, name in enumerate(names) for how, wrap in [wrappings[i % len(wrappings)]]]


def _planted_code() -> list[Attack]:
    names = ("__init__.py", "conftest.py", "sitecustomize.py", "usercustomize.py", "modeling_dlm.py", "tokenization.py",
             "torch.py", "yaml.py", "safetensors.py", "handler.py", "start.pth", "setup.py")
    found = [Attack(f"python as {name}", planted(name, text("import os; PYTHON")), "checkpoint") for name in names]
    auto_map = json.dumps({"auto_map": {"AutoModel": "modeling_dlm.Model"}, "trust_remote_code": True})
    return [*found, Attack("auto_map in config.json", planted("config.json", text(auto_map)), "checkpoint"),
            Attack("python in the dataset", in_data("train.py", text("PYTHON")), "data")]


def _deepspeed_folder(scene: Scene) -> None:
    for name in ("global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        planted(name, torch_file)(scene)
    planted("latest", text("global_step2"))(scene)
    planted("zero_to_fp32.py", text("PYTHON"))(scene)


def _only_deepspeed(scene: Scene) -> None:
    """A run folder with nothing but DeepSpeed's own checkpoint."""
    shutil.rmtree(scene.newest.parent)
    scene.newest.mkdir(parents=True)
    _deepspeed_folder(scene)


def _pickles_in_place() -> list[Attack]:
    """Instead of the files that are read, vouched for by a resealed manifest."""
    names = ("rank_00000.safetensors", "state.json", "config.yaml", "tokenizer_meta.json", "characters.json")
    return [Attack(f"{how} in place of {name}", forged(name, wrap), "checkpoint", must_be_refused=True)
            for i, name in enumerate(names) for how, wrap in [list(WRAPPINGS.items())[i % 3]]]


YAML = {
    "object/apply": "!!python/object/apply:os.system ['COMMAND']",
    "object/new": "!!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
    "object": "!!python/object:os.system {}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
    "eval": "!!python/object/apply:builtins.eval ['PYTHON']",
    "tuple": "!!python/tuple [1, 2]",
    "own tag": "!run COMMAND",
    "include": "!include SECRET",
    "interpolation": "${oc.env:HOME} {{ PYTHON }} $(COMMAND)",
    "merge": "<<: {num_layers: 1}",
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\nb: [*a,*a,*a,*a,*a,*a,*a,*a]",
    "deep": DEEP,
    "huge number": HUGE,
    "binary": "!!binary aGVsbG8=",
    "two documents": "1\n---\n2",
    "nul": "a\0b",
}


def _yaml() -> list[Attack]:
    found = []
    for name, value in YAML.items():
        body = value if name in ("deep", "two documents", "nul") else f"model:\n  {value}\n"
        found.append(Attack(f"YAML {name} in a checkpoint", forged("config.yaml", text(body)), "checkpoint", True))
        found.append(Attack(f"YAML {name} in a config", _config(body), "config", True))
    found += [Attack(f"{how} as a config", _config(wrap), "config", True) for how, wrap in WRAPPINGS.items()]
    found.append(Attack("YAML on the command line", lambda scene: None, "override", True))
    return found


def _config(content: str | Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    make = text(content) if isinstance(content, str) else content
    return lambda scene: scene.specimen.config.write_bytes(make(scene)) and None


STATE = {"step": 2, "samples": 16, "tokens": 256, "data_fingerprint": "0" * 32}
TOKENIZER = {"tokenizer": {"kind": "char", "files": ["characters.json"], "hash": "0" * 64}, "vocab_size": 30,
             "mask_id": 29, "suppressed_ids": [], "eos_id": None}
HOSTILE_VALUES = {"code": "__import__('os').system('COMMAND')", "negative": -1, "huge": 10**30, "true": True,
                  "list": [1], "null": None, "object": {"a": 1}, "float": 1.5}


def _json() -> list[Attack]:
    raw = {"deep": DEEP, "huge number": HUGE, "infinity": "Infinity", "not a number": "[NaN]", "no object": "[]",
           "a number": "3", "twice": '{"step": 1, "step": 2}', "cut": '{"step"', "empty": ""}
    found = []
    for file in ("state.json", "tokenizer_meta.json", "characters.json"):
        found += [Attack(f"{name} in {file}", forged(file, text(body)), "checkpoint", True) for name, body in raw.items()
                  if (file, name) != ("characters.json", "twice")]
        found.append(Attack(f"UTF-16 in {file}", forged(file, lambda scene: '{"step": 1}'.encode("utf-16")),
                            "checkpoint", True))
    for name, value in HOSTILE_VALUES.items():
        found.append(Attack(f"{name} as step", forged("state.json", text(json.dumps(STATE | {"step": value}))),
                            "checkpoint", True))
        if name != "huge":
            found.append(Attack(f"{name} as vocab_size", _tokenizer(vocab_size=value), "checkpoint", True))
        found.append(Attack(f"{name} in meta.json", _meta("format_version", value), "data", True))
    for name in ("../../../secret.txt", "/etc/passwd", "a/b", "..", "", "characters.json\0"):
        named = TOKENIZER["tokenizer"] | {"files": [name]}
        found.append(Attack(f"tokenizer file {name!r}", _tokenizer(tokenizer=named), "checkpoint", True))
        found.append(Attack(f"tokenizer file {name!r} of a dataset", _meta("tokenizer", named), "data", True))
    for kind in ("../evil", "os.system", "pickle", "hf"):
        named = TOKENIZER["tokenizer"] | {"kind": kind}
        found.append(Attack(f"tokenizer kind {kind!r}", _tokenizer(tokenizer=named), "checkpoint", True))
    found += [Attack(f"{name} as meta.json", in_data("meta.json", text(body)), "data", True) for name, body in raw.items()]
    found.append(Attack("a vocabulary of 10^15 ids", _tokenizer(vocab_size=10**15), "checkpoint", True))
    return found


def _tokenizer(**changes: object) -> Callable[[Scene], None]:
    return forged("tokenizer_meta.json", text(json.dumps(TOKENIZER | changes)))


def _meta(key: str, value: object) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        path = scene.data / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return plant


def _manifest() -> list[Attack]:
    record = {"size": 0, "xxh3_128": "0" * 32}
    names = ("../../../secret.txt", "/etc/passwd", "../step_00000001/config.yaml", "a/../../x", "rank_00000.safetensors/",
             "\0", "a" * 5000)
    found = [Attack(f"manifest names {name[:40]!r}", _sealed(lambda body, n=name: body["files"].update({n: record})),
                    "checkpoint", True) for name in names]
    found += [Attack(f"{how} in place of manifest.json", _replaced("manifest.json", wrap), "checkpoint", True)
              for how, wrap in WRAPPINGS.items()]
    found.append(Attack("a number of 6000 digits in the manifest", _replaced("manifest.json", text(HUGE)), "checkpoint",
                        True))
    return found


def _sealed(change: Callable[[dict], None]) -> Callable[[Scene], None]:
    return lambda scene: reseal(scene.newest, change)


def _replaced(name: str, content: Callable[[Scene], bytes]) -> Callable[[Scene], None]:
    return lambda scene: (scene.newest / name).write_bytes(content(scene)) and None


def _link(name: str, target: Callable[[Scene], Path]) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        reseal(scene.newest)
        (scene.newest / name).unlink()
        (scene.newest / name).symlink_to(target(scene))

    return plant


def _pipe(folder: Callable[[Scene], Path], name: str) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        (folder(scene) / name).unlink(missing_ok=True)
        os.mkfifo(folder(scene) / name)

    return plant


def _unlisted_pipe(scene: Scene) -> None:
    """The tokenizer's file: left out of the manifest, so that nothing has looked at it, and a pipe."""
    _pipe(lambda s: s.newest, "characters.json")(scene)
    reseal(scene.newest, lambda body: body["files"].pop("characters.json"))


def _places() -> list[Attack]:
    """Links that leave the folder, pipes that block, folders where a file should be."""
    def newest(scene: Scene) -> Path:
        return scene.newest

    def data(scene: Scene) -> Path:
        return scene.data

    found = [Attack(f"{name} links to a secret", _link(name, lambda scene: scene.secret), "checkpoint", True)
             for name in ("config.yaml", "state.json", "characters.json", "rank_00000.safetensors", "manifest.json")]
    found.append(Attack("a rank file links to /dev/zero", _link("rank_00001.safetensors", lambda s: Path("/dev/zero")),
                        "checkpoint", True))
    found += [Attack(f"{name} is a pipe", _pipe(newest, name), "checkpoint", True)
              for name in ("manifest.json", "state.json", "config.yaml", "rank_00000.safetensors")]
    found.append(Attack("an unlisted tokenizer file is a pipe", _unlisted_pipe, "checkpoint", True))
    found += [Attack(f"{name} is a pipe", _pipe(data, name), "data", True)
              for name in ("meta.json", "train.idx", "train.bin", "characters.json")]
    found.append(Attack("a checkpoint that is a link to itself", lambda s: (s.newest.parent / "step_00000003").symlink_to(
        "step_00000003"), "checkpoint"))
    return found


def _data_in_place() -> list[Attack]:
    names = ("train.idx", "train.bin", "meta.json", "characters.json")
    return [Attack(f"{how} in place of {name}", in_data(name, wrap), "data", True)
            for name in names for how, wrap in [("pickle", pickle_of), ("torch", torch_file)]]


def _hub_folders() -> list[Attack]:
    """Local folders as `hf:` datasets: loading scripts, pickles, archives with pickles, cards with tags."""
    script = "import datasets, os\nPYTHON\nclass Evil(datasets.GeneratorBasedBuilder):\n    pass\n"
    card = "---\nconfigs:\n- config_name: default\n  data_files: !!python/object/apply:os.system ['COMMAND']\n---\n"
    files = {"a loading script": ("source.py", text(script)), "a pickle": ("rows.pkl", pickle_of),
             "a pickled table": ("rows.pickle", pickle_exec), "a shard of pickles": ("shard.tar", tar_of),
             "a torch file": ("rows.pt", torch_file), "tags in the card": ("README.md", text(card)),
             "an Arrow cache that is a pickle": ("cache.arrow", pickle_of), "Parquet that is a pickle":
             ("rows.parquet", pickle_of)}
    return [Attack(f"hf: folder with {name}", source_file(*what), "hub", True) for name, what in files.items()]


def all_attacks() -> list[Attack]:
    from tests.faults.attacks_on_sources import source_attacks, tokenizer_attacks

    deepspeed = [Attack("DeepSpeed's files beside ours", _deepspeed_folder, "checkpoint"),
                 Attack("only DeepSpeed's files", _only_deepspeed, "checkpoint", True)]
    return [*_planted_pickles(), *_planted_code(), *deepspeed, *_pickles_in_place(), *_yaml(), *_json(), *_manifest(),
            *_places(), *_data_in_place(), *_hub_folders(), *source_attacks(), *tokenizer_attacks()]
