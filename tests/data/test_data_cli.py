"""`dlm prepare` and `dlm data`: what they print, their exit codes, and that help stays cheap."""

import subprocess
import sys

import numpy as np
import pytest

from dlm_scale.cli import main
from dlm_scale.data import verify as verify_module


def test_prepare_then_look_at_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "D"
    assert main(["prepare", str(tmp_path / "a.txt"), "--tokenizer=char", f"--out={out}", "--val_fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "1,440 tokens" in said and "360 tokens" in said and f"data.train={out}/train" in said
    assert main(["data", "verify", f"{out}/train"]) == 0
    assert "all good" in capsys.readouterr().out
    assert main(["data", "stats", f"{out}/val"]) == 0
    assert "tokens: 360\n" in capsys.readouterr().out
    assert main(["data", "head", f"{out}/train", "--max_characters=9"]) == 0
    assert capsys.readouterr().out == "--- 0\nthe quick ...\n"
    assert main(["data", "head", f"{out}/train", "--seq_len=4", "--count=2"]) == 0
    assert capsys.readouterr().out == "--- 0\nthe \n--- 1\nquic\n"
    assert main(["prepare", str(tmp_path / "a.txt"), "--tokenizer=char", f"--out={out}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["prepare", "--overwrite=true", str(tmp_path / "a.txt"), "--tokenizer=byte", f"--out={out}"]) == 0


def test_refusals_exit_2_with_one_message(tmp_path, capsys):
    for arguments in (["prepare", "x"], ["prepare", "no-file", "--tokenizer=byte", f"--out={tmp_path}/D"],
                      ["data", "verify", "no/such"], ["data"]):  # fmt: skip
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_verify_finds_every_kind_of_damage(dataset, capsys, monkeypatch):
    def fault():
        code = main(["data", "verify", str(dataset / "train")])
        return capsys.readouterr().err if code == 2 else ""

    assert fault() == ""
    data = np.memmap(dataset / "train.bin", dtype="<u2", mode="r+")
    kept = int(data[1000])
    data[1000] = kept ^ 1  # still a good id
    assert "bytes 0 to" in fault()

    class AnyHash(str):
        __ne__ = __eq__ = lambda self, other: False

    real = verify_module._check_block
    monkeypatch.setattr(verify_module, "_check_block", lambda data, i, expected, v: real(data, i, AnyHash(), v))
    data[1000] = 300
    assert "token 1000 is id 300" in fault()
    data[1000] = 255
    assert "largest id 255" in fault()
    data[1000] = kept
    assert fault() == ""


@pytest.mark.parametrize("tool", [["-m", "dlm_scale.cli", "prepare"], ["tools/prepare_data.py"]])
def test_as_programs(tmp_path, repository_root, tool):
    (tmp_path / "a.txt").write_text("some text " * 30)
    command = [sys.executable, *tool, str(tmp_path / "a.txt"), "--tokenizer=byte", f"--out={tmp_path}/D"]
    done = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "D" / "meta.json").exists(), done.stderr
    again = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "already holds a dataset" in again.stderr


def test_arguments_import_nothing_heavy_and_data_no_torch():
    code = (
        "import argparse, sys; from dlm_scale import prepare; from dlm_scale.data import cli\n"
        "prepare.add_arguments(argparse.ArgumentParser()); cli.add_data_arguments(argparse.ArgumentParser())\n"
        "assert not {'numpy', 'torch'} & set(sys.modules)\n"
        "import dlm_scale.data.loader, dlm_scale.data.prepare, dlm_scale.data.verify\n"
        "assert not {'torch', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
