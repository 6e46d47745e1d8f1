"""DeepSpeed's own checkpoints, made by DeepSpeed: equal to what zero_to_fp32 gives, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from dlm_scale.checkpoint.reader import open_checkpoint
from dlm_scale.convert.deepspeed import deepspeed_store
from dlm_scale.convert.source import open_model
from dlm_scale.convert.targets import write_checkpoint_target
from dlm_scale.convert.torch_files import read_torch_file
from dlm_scale.errors import UsageError
from tests.forked import run_ranks

STAGES = {"zero1": (1, "fp32"), "zero2_bf16": (2, "bf16"), "zero3": (3, "fp32")}
MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Odd(nn.Module):
    """Sizes that divide by nothing, tied and frozen weights, a buffer."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(37, 15), nn.Linear(15, 33), nn.Linear(33, 15)
        self.frozen, self.head = nn.Linear(15, 15), nn.Linear(15, 37, bias=False)
        self.frozen.requires_grad_(False)
        self.register_buffer("places", torch.arange(5.0))

    def tie(self):
        self.head.weight = self.table.weight
        return self

    def forward(self, x_BL):
        hidden = self.frozen(self.down(torch.relu(self.up(self.table(x_BL)))))
        return self.head(hidden).float().logsumexp(-1).mean()


def train_by_deepspeed(folder: Path) -> None:
    """On every rank: two steps at each stage, and one of our own models at ZeRO 3."""
    from dlm_scale.engine.runtime import import_deepspeed, start_runtime, stop_runtime
    from dlm_scale.engine.saving import start_fresh
    from tests.engine.cases import build_trainer, case_config, open_data

    warnings.filterwarnings("ignore")
    runtime = start_runtime("cpu", 1, 60)
    deepspeed = import_deepspeed()
    for name, (stage, precision) in STAGES.items():
        torch.manual_seed(0)
        adam = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
        config = {"train_micro_batch_size_per_gpu": 2, "optimizer": adam, "zero_optimization": {"stage": stage}}
        config |= {} if precision == "fp32" else {precision: {"enabled": True}}
        model = Odd().tie()
        if stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
        for _ in range(2):
            engine.backward(engine(torch.arange(4).view(2, 2)))
            engine.step()
        engine.save_checkpoint(str(folder / name))
    config = case_config(zero__stage=3, train__micro_batch_size=4)
    data = open_data("synthetic:389", config.model.seq_len, 5)
    trainer = build_trainer(config, runtime, data.vocabulary)
    start_fresh(trainer)
    trainer.engine.save_checkpoint(str(folder / "ours"))
    stop_runtime()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, train_by_deepspeed, folder)
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_bit_equal_to_zero_to_fp32(name, made):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    store, wanted = deepspeed_store(made / name), get_fp32_state_dict_from_zero_checkpoint(str(made / name))
    assert {*store.tensors, *store.aliases} == set(wanted) and store.aliases == {"head.weight": "table.weight"}
    for key, values in wanted.items():
        assert torch.equal(store.read(key, torch.float32), values.contiguous().float()), key


def test_a_model_of_ours_becomes_a_checkpoint_of_ours(made, tmp_path):
    from dlm_scale.config import dump_config
    from dlm_scale.model.initialise import initial_values
    from dlm_scale.model.sharding import full_box
    from tests.engine.cases import case_config

    config = case_config(zero__stage=3, train__micro_batch_size=4)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    model = open_model(made / "ours", tmp_path / "config.yaml")
    write_checkpoint_target(model, tmp_path / "out", slot=None, ranks=1, tensor_size=1, say=lambda text: None)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, spec in model.table.items():
        wanted = initial_values(spec, config.train.seed, full_box(spec.view), 0, spec.numel)
        assert torch.equal(checkpoint.read(name).view(-1), torch.from_numpy(wanted)), name


def test_incomplete_and_unknown_checkpoints_are_refused_by_name(made, tmp_path):
    def refused(change, complaint):
        folder = tmp_path / "copy"
        shutil.copytree(made / "zero3", folder)
        (tag,) = folder.glob("global_step*")
        change(tag)
        with pytest.raises(UsageError, match=complaint):
            deepspeed_store(folder)
        shutil.rmtree(folder)

    refused(lambda tag: (tag / OPTIMIZER_FILE).unlink(), "parts of 1 ranks, 2 wrote it")
    refused(lambda tag: [path.unlink() for path in tag.glob("*model_states.pt")], "lacks model_states")
    refused(lambda tag: (tag / OPTIMIZER_FILE).write_bytes((tag / OPTIMIZER_FILE).read_bytes()[:-300]), "cut short")
    refused(lambda tag: (tag / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b""), "tensor-parallel")
    refused(lambda tag: (tag.parent / "latest").write_text("../elsewhere"), "no folder there")
    with pytest.raises(UsageError, match="add --config"):
        open_model(made / "zero3")


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that leave the canary when anything follows them."""
    import builtins
    import os
    import subprocess

    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    tensor = torch._utils._rebuild_tensor_v2
    objects = {
        "os.system": Calls(os.system, command), "exec": Calls(builtins.exec, code), "eval": Calls(builtins.eval, code),
        "popen": Calls(subprocess.Popen, ["touch", str(canary)]), "open": Calls(builtins.open, str(canary), "w"),
        "import": Calls(builtins.__import__, "antigravity"), "getattr": Calls(getattr, os, "system"),
        "torch.load": Calls(torch.load, str(canary)),
        "nested": Calls(OrderedDict, [("module", Calls(os.system, command))]),
        "as a tensor": Calls(torch._tensor._rebuild_from_type_v2, os.system, str, (command,), None),
        "in a tensor": Calls(tensor, Calls(os.system, command), 0, (1,), (1,), False, OrderedDict()),
    }  # fmt: skip
    found = {f"{name}, protocol {protocol}": pickle.dumps(value, protocol) for name, value in objects.items()
             if name != "getattr" for protocol in (0, 2, 4, 5)}  # fmt: skip
    quoted = repr(command).encode()
    by_hand = {"INST": b"(S" + quoted + b"\nios\nsystem\n.", "OBJ": b"(cos\nsystem\nS" + quoted + b"\no.",
               "EXT": b"\x82\x01.", "a name and a build": b"cos\nsystem\n}S" + quoted + b"\ns" + b"b.",
               "a call of data": b"\x80\x02}\x85R.", "names as data": b"\x80\x02ctorch\nSize\nq\x00h\x00\x85R.",
               "an empty stack": b"\x80\x020000R.", "no end": b"\x80\x02N", "": b""}  # fmt: skip
    return found | by_hand


def torch_zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
def test_planted_payloads_are_refused_and_nothing_runs(name, made, tmp_path):
    """In place of a file, and bare where a zip is expected; some stand for data that is no checkpoint."""
    shutil.copytree(made / "zero3", tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob(f"*/{name}")
    canary = tmp_path / "canary"
    for how, data in payloads(canary).items():
        for content in (torch_zip(data), data):
            file.write_bytes(content)
            with pytest.raises(UsageError):
                deepspeed_store(tmp_path / "copy")
            assert not canary.exists(), how


def test_a_payload_inside_a_sound_file_is_refused(made, tmp_path):
    """The real pickle, with a call of os.system among its entries."""
    (source,) = (made / "zero3").glob(f"*/{MODEL_FILE}")
    canary = tmp_path / "canary"
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (key,) = (name for name in members if name.endswith("data.pkl"))
    call = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR0"
    for place in (2, len(members[key]) - 1):
        changed = members | {key: members[key][:place] + call + members[key][place:]}
        with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        with pytest.raises(UsageError, match="os.system"):
            read_torch_file(tmp_path / "file.pt")
        assert not canary.exists()


def test_damaged_pickles_give_data_or_one_clear_error(made, tmp_path):
    (source,) = (made / "zero3").glob(f"*/{OPTIMIZER_FILE}")
    with zipfile.ZipFile(source) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    rng, refused = random.Random(3), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        (tmp_path / "file.pt").write_bytes(torch_zip(bytes(changed)))
        try:
            read_torch_file(tmp_path / "file.pt")
        except UsageError:
            refused += 1
    assert refused > 100


def test_what_torch_saves_is_read_as_it_is(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(6, dtype=torch.int16),
        "half": torch.randn(7).bfloat16(),
        "view": torch.arange(10.0)[2:8],
        "none": torch.zeros(0, 3),
        "weight": nn.Parameter(torch.randn(2, 2)),
        "scalar": torch.tensor(2.5),
    }
    torch.save({"inside": tensors, "number": 3, "text": "x", "list": [1, None, True]}, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    assert (found["number"], found["text"], found["list"]) == (3, "x", [1, None, True])
    from dlm_scale.convert.stores import Store

    store = Store(tmp_path, found["inside"])
    assert all(torch.equal(store.read(name), tensors[name].detach()) for name in tensors)
    torch.save({"x": torch.randn(4, 3).T}, tmp_path / "file.pt")
    with pytest.raises(UsageError, match="not contiguous"):
        read_torch_file(tmp_path / "file.pt")
    assert json.dumps(sorted(found["inside"]))
