"""The program: round trips at every layout, what it refuses and leaves behind, restarts, memory."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dlm_scale.checkpoint.reader import open_checkpoint, weights_hash
from dlm_scale.cli import run_command
from dlm_scale.convert import writing
from dlm_scale.convert.bundle import bundle_files
from dlm_scale.errors import UsageError
from dlm_scale.inference import load_for_inference
from tests.conftest import ROOT
from tools.convert_checkpoint import CONVERT

LAYOUTS = [(1, 1), (3, 1), (2, 2), (4, 2), (4, 4)]  # ranks, tensor-parallel size


def convert(*arguments) -> int:
    return run_command(CONVERT, [str(argument) for argument in arguments], "convert_checkpoint")


def refusal(*arguments) -> str:
    with pytest.raises(UsageError) as caught:
        convert(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("ranks, tensor_size", LAYOUTS)
def test_ours_to_hugging_face_and_back_at_any_layout_is_bit_equal(ranks, tensor_size, checkpoint, tmp_path):
    source = checkpoint()
    options = ["--ranks", ranks, "--tensor_parallel_size", tensor_size]
    convert(source, tmp_path / "laid_out", "--to=dlm", *options)
    convert(tmp_path / "laid_out", tmp_path / "hf", "--to=hf", "--weights=param")
    convert(tmp_path / "hf", tmp_path / "back", "--to=dlm", *options)
    first, laid_out, back = (open_checkpoint(folder) for folder in (source, tmp_path / "laid_out", tmp_path / "back"))
    assert laid_out.manifest.world_size == ranks and len(list((tmp_path / "laid_out").glob("rank_*"))) == ranks
    assert set(laid_out.tensors) == set(first.tensors)  # the optimizer travels too
    for name, slot in first.tensors:
        assert torch.equal(first.read(name, slot), laid_out.read(name, slot))
    assert weights_hash(back) == weights_hash(first) and {slot for _, slot in back.tensors} == {"param"}
    assert back.document("config.yaml") == first.document("config.yaml") and back.state == first.state
    load_for_inference(tmp_path / "back", device="cpu").tokenizer.encode("text")


def test_a_trained_run_at_tensor_parallel_zero_3_goes_through_unchanged(tmp_path):
    from tests.forked import run_ranks

    run_ranks(4, _train_and_save, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf", "--to=hf")
    convert(tmp_path / "hf", tmp_path / "back", "--to=dlm", "--ranks=2", "--tensor_parallel_size=2")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert weights_hash(open_checkpoint(tmp_path / "back")) == weights_hash(open_checkpoint(folder))


def _train_and_save(out) -> None:
    from dlm_scale.config import dump_config
    from dlm_scale.engine.runtime import start_runtime, stop_runtime
    from dlm_scale.engine.saving import save, start_fresh, tokenizer_documents
    from dlm_scale.engine.step import make_batch, train_step
    from tests.engine.cases import build_trainer, case_config, open_data

    runtime = start_runtime("cpu", 2, 60)
    config = case_config(
        zero__stage=3, train__micro_batch_size=4, parallel__tensor_parallel_size=2, model__num_kv_heads=2
    )
    data = open_data("synthetic:389", config.model.seq_len, 5)
    trainer = build_trainer(config, runtime, data.vocabulary)
    state = start_fresh(trainer)
    train_step(trainer, make_batch(trainer, data, state), state)
    documents = tokenizer_documents(data) | {"config.yaml": dump_config(config).encode(), "provenance.json": b"{}"}
    save(trainer, type(state)(1, 8), out, documents, data.fingerprint)
    stop_runtime()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_for_the_safetensors_library(dtype, checkpoint, tmp_path):
    source = open_checkpoint(checkpoint())
    flag = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    convert(
        source.path, tmp_path / "all.safetensors", "--to=safetensors", f"--dtype={flag}"
    )  # the average is there: taken
    found = load_file(tmp_path / "all.safetensors")
    assert set(found) == {name for name, _ in source.tensors}
    assert all(torch.equal(values, source.read(name, "ema").to(values.dtype)) for name, values in found.items())
    assert {str(values.dtype) for values in found.values()} == {f"torch.{dtype}"}
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"])["num_layers"] == 2
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_dry_run_prints_the_mapping_and_writes_nothing(checkpoint, tmp_path, capsys):
    source = checkpoint()
    before = set(tmp_path.iterdir())
    convert(source, tmp_path / "hf", "--to=hf", "--dry-run")
    assert "-> transformer.blocks.1.attention.qkv.weight [64, 32]" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before


def test_what_is_wrong_is_said_once_and_nothing_is_left(checkpoint, tmp_path):
    source = checkpoint()
    convert(source, tmp_path / "hf", "--to=hf")
    hf, target = tmp_path / "hf", tmp_path / "target"

    def changed(**values) -> None:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, **values}))

    def weights(change) -> None:
        tensors = load_file(hf / "model.safetensors")
        change(tensors)
        save_file(tensors, hf / "model.safetensors")

    whole = {path.name: path.read_bytes() for path in hf.iterdir() if path.is_file()}
    name = "transformer.blocks.0.attention.qkv.weight"
    cases = [
        (lambda: (hf / "model.safetensors").write_bytes(whole["model.safetensors"][:-100]), "tile the data"),
        (lambda: (hf / "model.safetensors").unlink(), "missing"),
        (lambda: changed(model_type="mamba"), "'mamba' is no family"),
        (lambda: changed(num_layers=3), "blocks.2.attention_norm.gain is missing"),
        (lambda: changed(hidden_size=48), r"shape \[257, 32\], its config.json makes it \[257, 48\]"),
        (lambda: changed(mlp="relu"), "model.mlp"),
        (lambda: weights(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})), "int8"),
        (lambda: weights(lambda tensors: tensors.update({"lora_a": torch.zeros(3)})), "no place for tensor lora_a"),
        (lambda: weights(lambda tensors: tensors.pop(name)), f"{name} is missing"),
        (lambda: (hf / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "does not name files",
        ),
    ]
    for damage, complaint in cases:
        damage()
        assert re.search(complaint, refusal(hf, target, "--to=dlm")), complaint
        (hf / "model.safetensors.index.json").unlink(missing_ok=True)
        for file, data in whole.items():
            (hf / file).write_bytes(data)
        assert not target.exists() and not list(tmp_path.glob("target*")), complaint


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--to=dlm", "--dtype=bf16"], "float32 master weights"), (["--to=hf", "--ranks=2"], "--ranks is for --to dlm"),
     (["--to=hf", "--family=mamba"], "not known"), (["--to=hf", "--weights=momentum"], "invalid choice"),
     (["--to=dlm", "--ranks=3", "--tensor_parallel_size=2"], "multiple"), (["--to=safetensors"], "NAME.safetensors"),
     (["--to=dlm", "--ranks=8", "--tensor_parallel_size=8"], "model.num_heads = 4"),
     (["--to=hf", "--family=gpt2"], "place|none of")],
)  # fmt: skip
def test_flags_that_cannot_be_meant_are_refused(flags, complaint, checkpoint, tmp_path):
    assert re.search(complaint, refusal(checkpoint(), tmp_path / "target", *flags))
    assert not list(tmp_path.glob("target*"))


def test_a_destination_that_exists_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "hf").mkdir()
    assert "exists" in refusal(checkpoint(), tmp_path / "hf", "--to=hf") and not list((tmp_path / "hf").iterdir())
    assert "does not exist" in refusal(tmp_path / "nothing", tmp_path / "x", "--to=hf")
    assert "neither a run" in refusal(tmp_path / "hf", tmp_path / "x", "--to=hf")


def test_a_conversion_that_died_goes_on_from_its_last_whole_file(checkpoint, tmp_path, monkeypatch):
    source, options = checkpoint(), ["--to=hf", "--max_shard_gb=0.00002"]
    convert(source, tmp_path / "calm", *options)
    written, write_file = [], writing.write_file

    def dying(path, parts):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        return write_file(path, parts)

    monkeypatch.setattr(writing, "write_file", dying)
    assert "goes on from there" in refusal(source, tmp_path / "hf", *options)
    assert not (tmp_path / "hf").exists() and len(written) == 3
    (tmp_path / "hf.partial" / written[1]).write_bytes(b"damaged meanwhile")
    again = []
    monkeypatch.setattr(
        writing, "write_file", lambda path, parts: (again.append(path.name), write_file(path, parts))[1]
    )
    convert(source, tmp_path / "hf", *options)
    assert written[0] not in again and written[2] not in again and written[1] in again
    names = sorted(path.name for path in (tmp_path / "calm").rglob("*") if path.is_file())
    assert names == sorted(path.name for path in (tmp_path / "hf").rglob("*") if path.is_file())
    for path in (tmp_path / "calm").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "hf" / path.name).read_bytes()
    assert not (tmp_path / "hf.partial").exists()


def test_what_is_written_is_read_again_before_it_counts(checkpoint, tmp_path, monkeypatch):
    write_file = writing.write_file

    def lying(path, parts):
        record = write_file(path, parts)
        if path.name == "config.json":
            path.write_bytes(path.read_bytes().replace(b"{", b"(", 1))
        return record

    monkeypatch.setattr(writing, "write_file", lying)
    assert "config.json" in refusal(checkpoint(), tmp_path / "hf", "--to=hf") and not (tmp_path / "hf").exists()


def test_the_program_ends_with_2_and_one_line(tmp_path):
    program = [
        sys.executable,
        str(ROOT / "tools" / "convert_checkpoint.py"),
        str(tmp_path),
        str(tmp_path / "x"),
        "--to=hf",
    ]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error:" in done.stderr
    assert os.listdir(tmp_path) == []


MEASURE = """
import re, sys
from dlm_scale.cli import run_command
from tools.convert_checkpoint import CONVERT
run_command(CONVERT, sys.argv[1:], "convert_checkpoint")
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


def test_memory_is_that_of_the_largest_tensor(checkpoint, tmp_path):
    """At most 1.3 times its size and 300 MB, most of which are torch's own, whatever the model holds in all."""
    source = checkpoint(num_layers=10, hidden_size=320, num_heads=5, num_kv_heads=5, ffn_size=1280)
    tensors = open_checkpoint(source, verify=False).tensors.values()
    largest = max(4 * math.prod(tensor.shape) for tensor in tensors)
    assert 4 * sum(math.prod(tensor.shape) for tensor in tensors) > 20 * largest
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for target, flag in (("hf", "--to=hf"), ("dlm", "--to=dlm")):
        command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / target), flag]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) <= 1.3 * largest + 300e6, target


def test_the_code_of_an_export_imports_nothing_but_torch_transformers_and_numpy():
    import ast

    files = bundle_files()
    assert {"modeling_dlm_scale.py", "configuration_dlm_scale.py", "pipeline_dlm_scale.py"} < set(files)
    for name, data in files.items():
        for node in ast.walk(ast.parse(data)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                tops = {module.split(".")[0] for module in modules}
                assert tops <= {"torch", "transformers", "numpy", *sys.stdlib_module_names}, (name, tops)


def test_the_model_card_says_what_the_run_measured(checkpoint, tmp_path):
    source = checkpoint()
    lines = [{"step": 0, "val_nelbo": 5.5, "val_nelbo_se": 0.1}, {"step": 2, "loss": 1.0},
             {"step": 3, "val_nelbo": 1.25, "val_nelbo_se": 0.0125}, {"step": 9, "val_nelbo": 0.5}]  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10')
    convert(source, tmp_path / "hf", "--to=hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "NELBO <= 1.2500 nats a token (standard error 0.0125), perplexity <= 3.490, at step 3" in card
    assert "moving average (EMA)" in card and "256 ids" not in card and "257 ids (byte tokenizer), mask 256" in card
    convert(tmp_path / "run", tmp_path / "other", "--to=dlm")
    convert(tmp_path / "other", tmp_path / "elsewhere", "--to=hf")
    assert "No evaluation of this checkpoint is on record." in (tmp_path / "elsewhere" / "README.md").read_text()


def test_uploading_is_left_to_the_hubs_own_client(monkeypatch, tmp_path):
    """No network: the client is replaced, and its refusal becomes one of ours that says what is there."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    from dlm_scale.convert.push import push_folder

    calls = []

    class Client:
        endpoint = "https://hub.invalid"

        def create_repo(self, repository, **options):
            if "//" in repository:
                raise HFValidationError("no such name")
            calls.append((repository, options))

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    assert push_folder(tmp_path, "me/model") == "https://hub.invalid/me/model"
    assert calls == [("me/model", {"private": True, "exist_ok": True}), {"repo_id": "me/model", "folder_path": tmp_path}]
    with pytest.raises(UsageError, match="is complete, but could not be uploaded"):
        push_folder(tmp_path, "//")
