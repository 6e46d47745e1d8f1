"""Malicious files met by every public way of opening something, under an audit hook: `python -m tests.faults.audited`.

Arguments: an empty folder, and a stride over the attacks. Each attack runs in a forked child with a time limit. The
hook refuses and notes whatever executes: pickles that look up a name, commands, processes, foreign code, connections.
Prints a JSON object: the number of attacks, and a line for each that did anything but be refused or ignored.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch
import yaml

from dlm_scale import cli, train
from dlm_scale.checkpoint.folders import inspect_checkpoint
from dlm_scale.checkpoint.folders import find_checkpoint
from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.config import load_config
from dlm_scale.data.loader import ValidationData, open_data
from dlm_scale.data.meta import load_meta
from dlm_scale.data.prepare import prepare
from dlm_scale.data.tokenizer import load_tokenizer
from dlm_scale.data.verify import verify
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from tests.faults.attacks import all_attacks
from tests.faults.hostile import SECRET, Attack, Scene, pickle_of, planted, source_file, text, torch_file
from tests.faults.specimen import make_specimen

SECONDS, MEGABYTES = 40.0, 700
EXECUTING = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork",
             "subprocess.Popen", "pty.spawn", "socket.connect", "webbrowser.open", "ctypes.dlopen")
PRELOADED = ("datasets", "pandas", "pyarrow.parquet", "pyarrow.dataset", "tokenizers", "tiktoken", "zstandard",
             "deepspeed", "megatron.core", "dlm_scale.sample", "dlm_scale.evaluate", "dlm_scale.doctor",
             "dlm_scale.model.transformer", "dlm_scale.engine.session", "dlm_scale.sampling.strip")


class Audit:
    """The hook, and what it has seen."""

    def __init__(self, scene: Scene, folder: Path):
        self.scene, self.folder, self.seen = scene, str(folder), []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        is_foreign = (event in EXECUTING
                      or event == "exec" and arguments[0].co_filename.startswith(self.folder)
                      or event in ("compile", "exec") and self.scene.canary.name in self._source(event, arguments)
                      or event == "import" and isinstance(arguments[1], str) and arguments[1].startswith(self.folder)
                      or event == "open" and os.path.normpath(str(arguments[0])) == str(self.scene.secret))
        if is_foreign:
            self.seen.append(f"{event} {str(arguments)[:200]}")
            raise RuntimeError(f"refused by the audit: {event}")

    @staticmethod
    def _source(event: str, arguments: tuple) -> str:
        return repr(arguments[0].co_consts if event == "exec" else arguments[0])


def command(*words: str) -> None:
    """A `dlm` command: raises UsageError where it ends with exit code 2 and one message."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(list(words))
    if code:
        text = said.getvalue()
        if code != 2 or not text.startswith("dlm: error: ") or "Traceback" in text:
            raise RuntimeError(f"dlm {words[0]} ended with {code}: {text[-300:]}")
        raise UsageError(text)


def infer(scene: Scene) -> None:
    made = load_for_inference(scene.specimen.run, "cpu")
    made.predict(torch.zeros((1, 4), dtype=torch.int64), torch.arange(4))
    if made.step not in (1, 2):
        raise RuntimeError(f"step {made.step!r}")


def resume(scene: Scene) -> None:
    config = load_config(scene.specimen.config)
    data, _ = train.open_datasets(config)
    train.find_resume_point(config, data, inspect_checkpoint)


def tokenizer_of_data(scene: Scene) -> None:
    load_tokenizer(scene.data, load_meta(scene.specimen.prefix)[0]).decode([0, 1])


def prepare_with(tokenizer: str, source: str, scene: Scene) -> None:
    place = scene.data.parent
    name = next((str(p) for p in (place / "tokenizer").glob("*")), tokenizer)
    prepare(f"{source}{place / 'source'}", name, place / "made", overwrite=True)


def no_command(scene: Scene) -> None:
    load_config(scene.specimen.config, ["model.mlp=!!python/object/apply:os.system ['touch x']"])


RUN, PREFIX = (lambda scene: str(scene.specimen.run)), (lambda scene: str(scene.specimen.prefix))
ENTRIES: dict[str, dict[str, Callable[[Scene], object]]] = {
    "checkpoint": {
        "open_checkpoint": lambda scene: open_checkpoint(scene.newest),
        "find_checkpoint": lambda scene: weights_hash(open_checkpoint(find_checkpoint(scene.specimen.run)[0])),
        "state": lambda scene: open_checkpoint(scene.newest).state,
        "load_for_inference": infer,
        "resume": resume,
        "dlm checkpoint verify": lambda scene: command("checkpoint", "verify", RUN(scene)),
        "dlm checkpoint list": lambda scene: command("checkpoint", "list", RUN(scene)),
        "dlm sample": lambda scene: command("sample", RUN(scene), "--prompt=the", "-n1", "--max_new_tokens=2", "--steps=1",
                                            "--device=cpu"),
        "dlm evaluate": lambda scene: command("evaluate", RUN(scene), "--max_rows=1", "--num_draws=2", "--device=cpu"),
    },
    "data": {
        "open_data": lambda scene: open_data(PREFIX(scene), 16, 1),
        "ValidationData": lambda scene: ValidationData(PREFIX(scene), 16, 4).text(),
        "load_tokenizer": tokenizer_of_data,
        "verify": lambda scene: verify(PREFIX(scene)),
        **{f"dlm data {word}": lambda scene, word=word: command("data", word, PREFIX(scene))
           for word in ("verify", "stats", "head")},
    },
    "config": {
        "load_config": lambda scene: load_config(scene.specimen.config),
        "dlm train": lambda scene: command("train", str(scene.specimen.config)),
    },
    "override": {"load_config": no_command},
    "source": {
        "prepare": lambda scene: prepare_with("byte", "", scene),
        "dlm prepare": lambda scene: command("prepare", str(scene.data.parent / "source"), "--tokenizer=char",
                                             f"--out={scene.data.parent / 'made'}", "--overwrite", "--max_documents=20"),
    },
    "tokenizer": {"prepare": lambda scene: prepare_with("none", "", scene)},
    "hub": {"prepare": lambda scene: prepare_with("byte", "hf:", scene)},
}
NAIVE: dict[str, Callable[[Scene], object]] = {  # readers as they should not be: the hook must see each
    "pickle": lambda scene: pickle.loads((scene.newest / "model.pt").read_bytes()),
    "pickle in Python": lambda scene: pickle._loads((scene.newest / "model.pt").read_bytes()),
    "torch": lambda scene: torch.load(scene.newest / "model.pth", weights_only=False),
    "yaml": lambda scene: yaml.unsafe_load((scene.newest / "tags.yaml").read_text()),
    "exec": lambda scene: exec((scene.newest / "code.py").read_text()),
    "compile": lambda scene: runpy.run_path(str(scene.newest / "code.py")),
    "secret": lambda scene: Path(f"{scene.newest}/../../../../secret.txt").read_text(),
    "traceback": lambda scene: {}["key"],
}


def controls() -> Iterator[tuple[Attack, bool]]:
    """(attack, whether it must be seen): naive readers, and nothing hostile at all on every kind of entry point."""
    def plant(scene: Scene) -> None:
        for name, content in (("model.pt", pickle_of), ("model.pth", torch_file), ("code.py", text("PYTHON")),
                              ("tags.yaml", text("!!python/object/apply:os.system ['COMMAND']"))):
            planted(name, content)(scene)

    def plain(scene: Scene) -> None:
        source_file("a.txt", text("".join(f"some text {i}\n" for i in range(20))))(scene)
        source_file("b.txt", text("other text\n"))(scene)

    ENTRIES.update({f"naive {name}": {name: entry} for name, entry in NAIVE.items()})
    yield from ((Attack(f"a naive reader: {name}", plant, f"naive {name}"), True) for name in NAIVE)
    yield from ((Attack(f"nothing for {kind}", plain if kind in ("source", "hub") else lambda scene: None, kind), False)
                for kind in ("checkpoint", "data", "source", "hub"))


def outcomes(attack: Attack, scene: Scene, audit: Audit) -> Iterator[str]:
    """`refused`, `accepted`, or a line that says what should not have happened, for each entry point."""
    for name, entry in ENTRIES[attack.on].items():
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                entry(scene)
            outcome = "accepted"
        except UsageError as error:
            said.write(str(error))
            outcome = "refused"
        except (KeyboardInterrupt, SystemExit, BaseException) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{name}: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
        if SECRET in said.getvalue():
            outcome = f"{name}: said the secret"
        yield outcome
    yield from audit.seen


def meet(attack: Attack, scene: Scene, folder: Path) -> list[str]:
    """What went wrong when this process met the attack."""
    before, started = peak_megabytes(), time.monotonic()
    attack.plant(scene)
    audit = Audit(scene, folder)
    found = list(outcomes(attack, scene, audit))
    problems = [line for line in found if line not in ("refused", "accepted")]
    if scene.canary.exists():
        problems.append("the canary is there: something was executed")
    if attack.must_be_refused and "refused" not in found:
        problems.append("accepted everywhere")
    if attack.name.startswith("nothing") and "refused" in found:
        problems.append("refused")
    if peak_megabytes() - before > MEGABYTES:
        problems.append(f"took {peak_megabytes() - before:.0f} MB")
    if time.monotonic() - started > SECONDS / 2:
        problems.append(f"took {time.monotonic() - started:.0f} s")
    return problems


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_child(attack: Attack, scene: Scene, folder: Path) -> list[str]:
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C code says goes nowhere
        try:
            problems = meet(attack, scene, folder)
        except BaseException as error:
            problems = [f"{type(error).__name__}: {error}"]
        os.write(sender, json.dumps(problems)[:60_000].encode())
        os._exit(0)
    os.close(sender)
    descriptor = os.pidfd_open(child)
    if not wait([descriptor], SECONDS):
        os.kill(child, 9)
    os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    data = os.read(receiver, 65_536)
    os.close(receiver)
    return json.loads(data) if data else [f"hung for {SECONDS:.0f} s" if code == -9 else f"died with exit code {code}"]


def run(folder: Path, stride: int, only: str = "") -> dict[str, object]:
    """Every `stride`-th attack; and `controls`: a line for each that did not come out as it should."""
    for name in PRELOADED:
        importlib.import_module(name)
    work, pristine = folder / "work", folder / "pristine"
    work.mkdir()
    scene = Scene(make_specimen(work), folder / "canary", folder / "secret.txt")
    scene.secret.write_text(SECRET)
    shutil.copytree(work, pristine)
    attacks = [attack for attack in all_attacks() if only in attack.name]

    def problems_of(attack: Attack) -> list[str]:
        shutil.rmtree(work)
        shutil.copytree(pristine, work)
        scene.canary.unlink(missing_ok=True)
        return in_child(attack, scene, work)

    wrong = [f"{attack.name}: {found}" for attack, is_seen in controls() if bool(found := problems_of(attack)) != is_seen]
    problems = {attack.name: problems_of(attack) for attack in attacks[::stride]}
    return {"total": len(problems), "kinds": len(attacks), "controls": wrong,
            "failures": [f"{name}: {'; '.join(found)}" for name, found in problems.items() if found]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]).resolve(), int(sys.argv[2]), *sys.argv[3:])))
