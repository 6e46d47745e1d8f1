"""Packing, a mixture, samples passed over and rows of random length together, through whole runs."""

from __future__ import annotations

import json

import pytest

from dlm_scale.data.prepare import prepare
from tests.engine.reliability import train
from tests.engine.test_training import lines, status

STEPS = "train.num_steps=6"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Overrides: two datasets of short documents in a mixture, packed, a share cut short, a range passed over."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, word in (("a", "rose "), ("b", "thorn ")):
        texts = (json.dumps({"text": word * (1 + i % 5)}) + "\n" for i in range(200))
        (folder / f"{name}.jsonl").write_text("".join(texts))
        prepare(str(folder / f"{name}.jsonl"), "byte", folder / name)
    mixture = f"[{{path: {folder}/a/train, weight: 3.0}}, {{path: {folder}/b/train, weight: 1.0}}]"
    return (f"data.train={mixture}", "data.packing=best_fit", "data.random_length_share=0.5",
            "data.skip_samples=[[9,20],[30,31]]", "data.validation=null", STEPS)


@pytest.fixture(scope="module")
def whole(everything, config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(config_file, out, *everything) == [0]
    return out


def losses(out) -> list[dict]:
    return [line for line in lines(out) if "loss" in line]


@pytest.mark.parametrize("ranks, micro", [(2, 4), (2, 2), (4, 1)])
def test_any_layout_trains_on_the_same_rows(ranks, micro, whole, everything, config_file, tmp_path):
    assert set(train(config_file, tmp_path, *everything, f"train.micro_batch_size={micro}", ranks=ranks)) == {0}
    for mine, other in zip(losses(tmp_path), losses(whole), strict=True):
        assert mine["batch_hash"] == other["batch_hash"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_goes_on_to_the_bit(whole, everything, config_file, tmp_path):
    assert train(config_file, tmp_path, *everything, "train.stop_at_step=3") == [0]
    assert train(config_file, tmp_path, *everything) == [0]
    assert losses(tmp_path) == losses(whole)
    assert status(tmp_path)["weights_hash"] == status(whole)["weights_hash"]


def test_packing_may_not_change_in_a_run(everything, config_file, tmp_path, capfd):
    assert train(config_file, tmp_path, *everything, "train.stop_at_step=1") == [0]
    assert train(config_file, tmp_path, *everything, "data.packing=none") == [2]
    assert "data.packing: best_fit -> none" in capfd.readouterr().err
    assert train(config_file, tmp_path / "s", "data.train=synthetic", "data.synthetic_vocab_size=9", STEPS,
                 "data.validation=null", "data.packing=best_fit") == [2]
    assert "data.packing (command line) = best_fit needs documents" in capfd.readouterr().err


def test_each_rank_reads_the_rows_of_its_own_samples_alone(everything, config_file, tmp_path):
    """4 ranks, 2 accumulations of 1: what each asks its files for, together every row once."""
    assert set(train(config_file, tmp_path / "run", *everything, "train.micro_batch_size=1", ranks=4,
                     change=lambda rank: note_rows(tmp_path / f"rows_{rank}"))) == {0}
    assert set(train(config_file, tmp_path / "one", *everything, "train.micro_batch_size=8",
                     change=lambda rank: note_rows(tmp_path / "rows_of_all"))) == {0}
    read = [[json.loads(line) for line in (tmp_path / f"rows_{rank}").read_text().splitlines()] for rank in range(4)]
    everyone = [json.loads(line) for line in (tmp_path / "rows_of_all").read_text().splitlines()]
    assert [len(rows) for rows in read] == [12] * 4 and len(everyone) == 48  # 6 steps of 8
    assert sorted(sum(read, [])) == sorted(everyone)


def note_rows(path) -> None:
    """In this process, write down every row that is read from a file."""
    from dlm_scale.data.rows import PackedDocuments

    take = PackedDocuments.take

    def noting(self, row_B):
        with open(path, "a") as file:
            file.writelines(json.dumps([self.bin_path, row]) + "\n" for row in row_B.tolist())
        return take(self, row_B)

    PackedDocuments.take = noting
