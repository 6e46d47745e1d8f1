"""Recipes and hf: sources, really read by the `datasets` library, from small folders with the real columns."""

import pyarrow
import pyarrow.parquet
import pytest

from dlm_scale.data.hub import RECIPES, HubOptions, articles
from dlm_scale.data.prepare import prepare
from dlm_scale.data.sources import open_source
from dlm_scale.errors import UsageError

from .conftest import snapshot, texts_of

WEB_COLUMNS = ("id", "dump", "url", "date", "file_path", "language")


def parquet(path, texts, columns=(), rows=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    others = {name: [f"{name} {i}" for i in range(len(texts))] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table({"text": texts} | others), path, row_group_size=rows)


def numbered(count, what="document"):
    return [f"{what} {i}: " + "abc " * (i % 5) for i in range(count)]


def wikitext(names):
    lines = ("", " = {} = \n", "", " Text of {} . \n", " = = {} = = \n", " More @-@ {} . \n")
    return [line.format(name) for name in names for line in lines]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """recipe -> a folder of files as its repository has them."""
    root = tmp_path_factory.mktemp("hub")
    (root / "shakespeare_char").mkdir()
    (root / "shakespeare_char" / "input.txt").write_text("To be, or not to be\n" * 20)
    for i in range(2):
        texts = numbered(130)[65 * i : 65 * i + 65]
        parquet(root / "openwebtext" / "plain_text" / f"train-0000{i}-of-00002.parquet", texts)
        parquet(root / "fineweb" / "sample" / "10BT" / f"00{i}_00000.parquet", texts, WEB_COLUMNS)
        parquet(root / "fineweb-edu" / "sample" / "10BT" / f"00{i}_00000.parquet", texts, (*WEB_COLUMNS, "score"))
        parquet(root / "tinystories" / "data" / f"train-0000{i}-of-00002-a1.parquet", texts)
    parquet(root / "tinystories" / "data" / "validation-00000-of-00001-b2.parquet", numbered(20, "other"))
    lines = wikitext("ABC")
    for i in range(2):  # an article goes on in the next file
        parquet(root / "wikitext103" / f"train-0000{i}-of-00002.parquet", lines[10 * i : 10 * i + 10])
    parquet(root / "wikitext103" / "validation-00000-of-00001.parquet", wikitext("VW"))
    parquet(root / "wikitext103" / "test-00000-of-00001.parquet", wikitext("T"))
    parquet(root / "fineweb" / "data" / "CC-MAIN-2013-20" / "000_00000.parquet", numbered(9, "not of the sample"))
    (root / "fineweb" / "README.md").write_text(  # as the repository says which files a config has
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    return root


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if not recipe.chat])
@pytest.mark.parametrize("streaming", [True, False])
def test_every_recipe_from_a_stand_in(stand_ins, tmp_path, recipe, streaming):
    hub = HubOptions(str(stand_ins / recipe), streaming=streaming, cache=str(tmp_path / "cache"))
    made = {}
    for workers in (1, 2) if recipe == "openwebtext" and streaming else (1,):
        out = tmp_path / str(workers)
        meta = prepare(recipe, "char" if recipe == "shakespeare_char" else "byte", out, hub=hub, workers=workers)
        made[workers] = snapshot(out)
    assert made[workers] == made[1] and meta.source["name"] == recipe
    assert meta.source["repository"] == RECIPES[recipe].repository
    train, val = ([text.removesuffix("\0") for text in texts_of(tmp_path / "1", name)] for name in ("train", "val"))
    if recipe == "shakespeare_char":
        assert (train, val) == (["To be, or not to be\n" * 18], ["To be, or not to be\n" * 2])
    elif recipe == "wikitext103":
        assert train == ["".join(wikitext([name])) for name in "ABC"]
        assert val == ["".join(wikitext([name])) for name in "VW"]
    elif recipe == "tinystories":
        assert (train, val) == (numbered(130), numbered(20, "other"))
    else:
        assert sorted(train + val) == sorted(numbered(130)) and 2 < len(val) < 30
        assert train == [text for text in numbered(130) if text in train]  # in the order of the files


def test_limits_leave_a_validation_of_its_own_whole(stand_ins, tmp_path):
    hub = HubOptions(str(stand_ins / "tinystories"))
    meta = prepare("tinystories", "byte", tmp_path / "D", hub=hub, workers=1, max_documents=7)
    assert [s.documents for s in meta.splits.values()] == [7, 20]


def test_a_stream_has_a_chunk_a_row_group_and_continues(stand_ins, tmp_path, monkeypatch):
    source = open_source("openwebtext", hub=HubOptions(str(stand_ins / "openwebtext")))
    chunks = list(source.chunks(1 << 20, None))
    assert len(chunks) == 26 and [d.text for c in chunks for d in c.documents()] == numbered(130)


def test_refusals(stand_ins, tmp_path):
    for spec, hub, reason in (
        ("openwebtext", HubOptions(str(tmp_path / "none")), "no such folder"),
        ("shakespeare_char", HubOptions(str(stand_ins / "openwebtext")), "holds no .txt file"),
        (str(stand_ins), HubOptions(str(stand_ins)), "--from stands for"),
        ("tinystories", HubOptions(str(stand_ins / "openwebtext")), "validation"),
    ):
        with pytest.raises(UsageError, match=reason):
            prepare(spec, "byte", tmp_path / "D", hub=hub)
    with pytest.raises(UsageError, match="no column 'body'; give --text_key, one of: text"):
        list(open_source("fineweb", "body", HubOptions(str(stand_ins / "fineweb"))).documents())


def test_articles_begin_at_their_titles():
    lines = ["", " = A = \n", " text \n", " = = Section = = \n", " x = y \n", " = B, or C = \n", "text"]
    expected = ["", " = A = \n text \n = = Section = = \n x = y \n", " = B, or C = \ntext"]
    assert list(articles(iter(lines), RECIPES["wikitext103"].title)) == expected
