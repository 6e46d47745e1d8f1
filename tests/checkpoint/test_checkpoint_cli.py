"""`dlm checkpoint verify|list`."""
import argparse
import subprocess
import sys

import pytest

from dlm_scale.checkpoint.cli import add_arguments, run
from dlm_scale.errors import UsageError


def call(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folders(tmp_path, sim):
    return [sim.small_checkpoint(tmp_path, step=step) for step in (1, 2, 3)]


def damage(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def test_verify_names_every_bad_file(tmp_path, folders, capsys):
    assert call("verify", tmp_path) == call("verify", folders[0]) == 0
    assert capsys.readouterr().out.count("good") == 4
    damage(folders[1], "rank_00001.safetensors")
    damage(folders[1], "state.json")
    (folders[2] / "rank_00000.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        call("verify", tmp_path)
    for folder, name in ((folders[1], "rank_00001.safetensors"), (folders[1], "state.json"),
                         (folders[2], "rank_00000.safetensors")):
        assert f"{folder}: {name}" in str(caught.value)
    assert str(folders[0]) not in str(caught.value) and str(folders[0]) in capsys.readouterr().out
    assert call("verify", folders[0]) == 0


def test_list_shows_step_size_and_health(tmp_path, folders, capsys):
    damage(folders[2], "state.json")
    assert call("list", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [folder.name for folder in folders]
    assert [line.split("MB")[1].strip().split(":")[0] for line in lines] == ["good", "good, newest", "bad"]
    assert "state.json" in lines[2]
    with pytest.raises(UsageError, match="not a folder"):
        call("list", tmp_path / "absent")


def test_no_torch_is_needed_to_verify(tmp_path, folders):
    code = ("import sys, argparse, pathlib; from dlm_scale.checkpoint.cli import run;"
            "code = run(argparse.Namespace(action='verify', checkpoint=pathlib.Path(sys.argv[1])));"
            "sys.exit(code or 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True).returncode == 0
