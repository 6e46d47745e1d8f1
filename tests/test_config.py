"""Configs: every wrong key, type and combination is refused with its name; every right spelling is accepted."""

import importlib.util
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_scale.config import (
    Config,
    ModelConfig,
    config_from_dict,
    config_from_text,
    dump_config,
    known_keys,
    load_config,
    resolve_batch,
)
from dlm_scale.config_checks import nearest_batches
from dlm_scale.config_compare import config_difference, is_result_neutral
from dlm_scale.config_text import dump_yaml, parse_overrides, parse_yaml
from dlm_scale.deepspeed_keys import OWNED, PASSED, ZERO_OPTIMIZATION, deepspeed_problems
from dlm_scale.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = ROOT / "configs" / "shakespeare_char_tiny.yaml"


def refusal(*overrides: str, path: Path = TINY) -> str:
    with pytest.raises(UsageError) as raised:
        load_config(path, overrides)
    return str(raised.value)


def typos(name: str, seed: int) -> list[str]:
    """One deletion, one substitution and one transposition (or insertion), each at edit distance 1 or a swap."""
    rng = random.Random(f"{name}{seed}")
    i = rng.randrange(len(name))
    letter = rng.choice(string.ascii_lowercase)
    deleted = name[:i] + name[i + 1 :]
    substituted = name[:i] + letter + name[i + 1 :]
    inserted = name[:i] + letter + name[i:]
    return [typo for typo in (deleted, substituted, inserted) if typo and typo != name]


def all_keys(tree=PASSED, prefix="deepspeed") -> list[str]:
    below = [k for n, sub in tree.items() if not isinstance(sub, type) for k in all_keys(sub, f"{prefix}.{n}")]
    return [*(f"{prefix}.{name}" for name in tree), *below]


def every_key() -> list[str]:
    return [*Config.model_fields, *known_keys(), *all_keys()]


# ---- unknown keys -----------------------------------------------------------------------------------------------


def test_a_typo_of_any_key_at_any_level_is_refused_and_nearly_always_understood():
    keys, understood, total = set(every_key()), 0, 0
    for key in sorted(keys):
        *parents, name = key.split(".")
        for typo in typos(name, seed=0):
            wrong = ".".join([*parents, typo])
            if wrong in keys or (parents == ["deepspeed"] and typo in OWNED):
                continue
            message = refusal(f"{wrong}=1")
            assert message.startswith(f"{wrong} (command line) is not a known key"), message
            assert "\n" not in message
            total += 1
            understood += f"did you mean {key}?" in message
    assert total > 400
    assert understood >= 0.95 * total, f"{understood} of {total}"


def test_a_typo_in_the_file_names_the_file_and_the_valid_keys(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(TINY.read_text().replace("num_steps", "num_stps"))
    message = refusal(path=path)
    assert f"train.num_stps ({path}) is not a known key; did you mean train.num_steps?" in message
    assert "Valid in train:" in message and "global_batch_size" in message
    assert f"train.num_steps ({path}) is missing" in message


def test_typos_of_sections_sources_and_misplaced_keys():
    assert "did you mean train.num_steps?" in refusal("trian.num_steps=3")
    assert "did you mean optimizer.learning_rate?" in refusal("learning_rate=3e-4")
    assert "did you mean optimizer.learning_rate?" in refusal("train.learning_rate=3e-4")
    assert "data.train[0].wieght" in (message := refusal("data.train=[{path: a, wieght: 1}]"))
    assert "did you mean data.train[0].weight?" in message


def test_an_unknown_key_with_a_null_value_is_refused_too():
    assert "train.nothing" in refusal("train.nothing=null")


def test_all_errors_in_one_pass_but_at_most_five_lines():
    assert len(refusal("train.a=1", "model.b=2", "optimizer.eps=x").splitlines()) == 3
    lines = refusal(*(f"train.bogus{i}=1" for i in range(9))).splitlines()
    assert len(lines) == 5 and lines[-1] == "and 5 more"


# ---- types and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", known_keys())
def test_a_wrong_type_names_key_source_and_value(key):
    wrong = "{a: 1}" if key not in ("data.train", "data.prepare") else "7"
    message = refusal(f"{key}={wrong}")
    assert message.startswith(key) and "(command line) is" in message and "expected" in message.lower()
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.learning_rate='3e-4'",
        "optimizer.learning_rate=true",
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=.nan",
        "optimizer.learning_rate=.inf",
        "optimizer.beta1=1.0",
        "train.num_steps=1.5",
        "train.num_steps='10'",
        "train.num_steps=true",
        "train.num_steps=0",
        "train.num_steps=1e30",
        "train.eval_draws=3",
        "train.seed=-1",
        "train.compile=1",
        "train.compile=yes",
        "train.out=3",
        "train.out=''",
        "train.precision=fp16",
        "data.train=[]",
        "data.train=3",
        "data.train=[{path: a, weight: 0}]",
        "data.train=[{weight: 1}]",
        "model=7",
        "deepspeed=[1]",
        "deepspeed.zero_optimization=3",
        "deepspeed.zero_optimization.stage=4",
        "deepspeed.zero_optimization.stage=three",
        "deepspeed.zero_optimization.stage=true",
        "deepspeed.zero_optimization.overlap_comm=1",
        "deepspeed.zero_optimization.offload_optimizer.device=1",
    ],
)
def test_wrong_values_are_refused(setting):
    assert setting.split("=")[0] in refusal(setting)


def test_a_misspelt_choice_gets_the_right_one():
    assert "did you mean swiglu?" in refusal("model.mlp=swigl")
    assert "did you mean cosine" in refusal("diffusion.schedule=cosin")


def test_numbers_as_people_write_them():
    config = load_config(TINY, ["optimizer.learning_rate=3e-4", "train.num_steps=250_000", "train.seed=1e3"])
    assert (config.optimizer.learning_rate, config.train.num_steps, config.train.seed) == (3e-4, 250_000, 1000)
    assert load_config(TINY, ["optimizer.eps=1E-6", "optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0


def test_null_means_the_default():
    config = load_config(TINY, ["train.seed=null", "model.num_kv_heads=", "data.validation=null", "deepspeed=null"])
    assert (config.train.seed, config.model.num_kv_heads, config.data.validation) == (1, 4, None)
    assert config.deepspeed == {"zero_optimization": {"stage": 0}}
    assert "train (command line) is missing" in refusal("train=null")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(TINY).train.seed = 2


# ---- what no single key shows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["diffusion.schedule=cosine"], ["diffusion.weighting", "diffusion.schedule"]),
        (["model.hidden_size=130"], ["model.hidden_size", "model.num_heads"]),
        (["model.head_dim=33"], ["model.head_dim"]),
        (["model.num_kv_heads=3"], ["model.num_heads", "model.num_kv_heads"]),
        (["parallel.tensor_parallel_size=3"], ["model.num_heads", "parallel.tensor_parallel_size"]),
        (["model.ffn_size=383", "parallel.tensor_parallel_size=2"], ["model.ffn_size", "tensor_parallel_size"]),
        (
            ["model.seq_len=129", "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
            ["model.seq_len"],
        ),
        (
            ["model.num_heads=16", "model.num_kv_heads=8", "parallel.tensor_parallel_size=16", "model.hidden_size=256"],
            [],
        ),
        (["data.train=synthetic", "data.synthetic_vocab_size=null"], ["data.train", "data.synthetic_vocab_size"]),
        (["data.train=[synthetic, a]"], ["data.train"]),
        (["train.global_batch_size=33"], ["train.global_batch_size", "33 / (16 x 1)"]),
    ],
)
def test_cross_checks(overrides, named):
    if not named:
        load_config(TINY, overrides)
        return
    message = refusal(*overrides)
    assert all(name in message for name in named), message


def test_count_is_refused_with_every_schedule_but_linear():
    for schedule in ("loglinear", "poly", "cosine", "cosine2", "cos", "geometric"):
        assert "diffusion.weighting" in refusal(f"diffusion.schedule={schedule}")
        for weighting in ("elbo", "simple"):
            load_config(TINY, [f"diffusion.schedule={schedule}", f"diffusion.weighting={weighting}"])


def test_fewer_steps_than_warm_up_is_legal():
    assert load_config(TINY, ["train.num_steps=3", "optimizer.warmup_steps=100"]).train.num_steps == 3


# ---- two ways to say one quantity -------------------------------------------------------------------------------

NO_SHAPE = [f"model.{key}=null" for key in ("num_layers", "hidden_size", "num_heads", "ffn_size")]


def test_depth_gives_the_shape_that_is_not_named():
    """The seed's model: 12 layers and heads, width 768; what is named stays, and the resolved config has no depth."""
    model = load_config(TINY, [*NO_SHAPE, "model.depth=12"]).model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.head_dim) == (12, 768, 12, 64)
    named = [*NO_SHAPE, "model.num_layers=12", "model.hidden_size=768", "model.num_heads=12"]
    assert model == load_config(TINY, named).model and "depth" not in model.model_dump()
    model = load_config(TINY, [*NO_SHAPE, "model.depth=4", "model.hidden_size=512", "model.num_heads=4"]).model
    assert (model.num_layers, model.hidden_size, model.head_dim) == (4, 512, 128)


def test_a_batch_in_tokens_is_one_in_rows():
    config = load_config(TINY, ["train.global_batch_size=null", "train.total_batch_size=4096"])
    assert config == load_config(TINY) and config.train.global_batch_size == 4096 // config.model.seq_len == 32
    message = refusal("train.global_batch_size=null", "train.total_batch_size=4000")
    assert message.startswith("train.total_batch_size (command line) = 4000") and "set 3968 or 4096" in message
    assert "model.seq_len = 128: set 128" in refusal("train.global_batch_size=null", "train.total_batch_size=5")
    message = refusal("train.global_batch_size=null", "train.total_batch_size=4224")  # 33 rows in micro-batches of 16
    assert message.startswith("train.global_batch_size") and "33 / (16 x 1)" in message


@pytest.mark.parametrize(
    ("given", "value", "owner"),
    [
        ("model.depth", 6, "model.num_layers"),
        ("train.total_batch_size", 4096, "train.global_batch_size"),
        ("train.target_param_data_ratio", 20, "train.num_steps"),
    ],
)  # fmt: skip
def test_two_ways_exclude_each_other(given, value, owner):
    message = refusal(f"{given}={value}")
    assert given.split(".")[1] in message and owner.split(".")[1] in message and "give one of the two" in message
    assert len(message.splitlines()) == 1
    assert f"{owner} ({TINY}) is missing" in refusal(f"{owner}=null").replace("command line", str(TINY))
    both_wrong = refusal(f"{given}=x", *(f"{key}=null" for key in [owner] if key.startswith("train.")))
    assert both_wrong.startswith(f"{given} (command line) is 'x'") and len(both_wrong.splitlines()) == 1


def test_the_ratio_waits_for_the_vocabulary():
    config = load_config(TINY, ["train.num_steps=null", "train.target_param_data_ratio=20"])
    assert config.train.num_steps is None and config_from_text(dump_config(config), "copy") == config


# ---- the deepspeed section --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "owner"), OWNED.items())
def test_a_key_with_an_owner_names_both(key, owner):
    message = refusal(f"deepspeed.{key}=1")
    assert f"deepspeed.{key}" in message and f"owned by {owner}" in message
    assert owner in known_keys()


def test_a_misspelt_owned_key_points_to_the_owner():
    assert "did you mean optimizer.gradient_clip" in refusal("deepspeed.gradient_cliping=1.0")


@pytest.mark.parametrize("key", all_keys())
def test_auto_never_passes(key):
    assert key in refusal(f"deepspeed.{key.removeprefix('deepspeed.')}=auto")


def test_known_keys_pass_through_unchanged():
    zero = {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 500_000_000, "offload_param": {"device": "cpu"}}
    section = {"zero_optimization": zero, "wall_clock_breakdown": True}
    raw = parse_yaml(TINY.read_text(), "tiny") | {"deepspeed": section}
    assert config_from_dict(raw).deepspeed == section
    assert load_config(TINY, ["deepspeed.zero_optimization.reduce_bucket_size=5e8"]).deepspeed == {
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 500_000_000}
    }


def test_the_zero_keys_are_those_of_deepspeeds_own_models():
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    obsolete = {"legacy_stage1", "elastic_checkpoint"}
    models = {
        "": DeepSpeedZeroConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zenflow": ZenFlowConfig,
        "leaf_module": DeepSpeedZeroLeafModuleConfig,
    }
    for name, model in models.items():
        ours = ZERO_OPTIMIZATION[name] if name else ZERO_OPTIMIZATION
        current = {
            field.alias or key: field
            for key, field in model.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated") and key not in obsolete
        }
        assert set(ours) == set(current)
        for key, kind in ours.items():
            if isinstance(kind, type) and kind in (bool, int, float):
                assert kind.__name__ in str(current[key].annotation) or key == "stage", key


def test_the_top_level_keys_are_deepspeeds():
    folder = Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0])
    files = [*folder.glob("**/constants.py"), *folder.glob("**/*config.py")]
    sources = "".join(file.read_text() for file in files)
    for name in [*PASSED, *OWNED]:
        assert re.search(rf"""["']{name}["']|\b{name}\b *[:=]""", sources), name


def test_an_empty_section_has_no_problems():
    assert deepspeed_problems({}) == []


# ---- overrides and YAML -----------------------------------------------------------------------------------------


WHOLE_SECTION = "train={global_batch_size: 4, micro_batch_size: 4, num_steps: 7, out: x, compile: true}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.num_steps=7", "train.compile=True", "data.train=D/train"],
        ["--train.num_steps=7", "--train.compile=true", "--data.train=D/train"],
        ["--train.num_steps", "7", "--train.compile", "TRUE", "--data.train", "D/train"],
        ["--local_rank=1", "--train.num-steps=7", "--train.compile=true", "data.train=[D/train]"],
        ["--local_rank", "1", WHOLE_SECTION, "data.train=[{path: D/train}]"],
    ],
)
def test_every_spelling_of_an_override(arguments):
    config = load_config(TINY, arguments)
    assert config.train.num_steps == 7 and config.train.compile is True
    assert [(s.path, s.weight) for s in config.data.train] == [("D/train", 1.0)]


def test_nested_and_list_overrides():
    config = load_config(
        TINY, ["deepspeed.zero_optimization.stage=3", "data.train=[{path: a, weight: 2}, {path: b, weight: 0.5}]"]
    )
    assert config.deepspeed["zero_optimization"]["stage"] == 3
    assert [(s.path, s.weight) for s in config.data.train] == [("a", 2.0), ("b", 0.5)]
    assert load_config(TINY, ["data.train=synthetic"]).data.is_synthetic


def test_the_last_of_two_overrides_wins():
    assert load_config(TINY, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    "arguments", [["7"], ["-x"], ["--train.seed"], ["--train.seed", "--train.out=x"], ["train.seed"], ["train..seed=1"]]
)
def test_what_is_no_override_is_refused(arguments):
    with pytest.raises(UsageError, match=re.escape(arguments[0])):
        parse_overrides(arguments)


def test_a_path_through_something_else_is_refused():
    assert "set data.train=... as a whole" in refusal("data.train.path=x", path=ROOT / "configs" / "owt_124m.yaml")
    assert "set train.seed=... as a whole" in refusal("train.seed.deep.er=1")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e3", 1000), ("1.0", 1.0), (".5", 0.5), ("-2", -2), ("010", 10), ("1_000", 1000),
        ("true", True), ("False", False), ("off", "off"), ("no", "no"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("'7'", "7"), ("", None), ("~", None), ("a/b", "a/b"), ("[1, x]", [1, "x"]), ("0x10", "0x10"),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x", "a: 1\na: 2", "1: x", "[1, 2", "a: !!python/object/apply:os.system [ls]", "a: !!int x",
        "[" * 5000, "a: \x00", "a: b: c", "--- 1\n--- 2", "@x",
    ],
)  # fmt: skip
def test_bad_yaml_is_one_clear_line(text):
    with pytest.raises(UsageError, match="^test.*not valid YAML") as raised:
        parse_yaml(text, "test")
    assert "\n" not in str(raised.value)


def test_files_that_are_no_config(tmp_path):
    assert "did you mean" in refusal(path=ROOT / "configs" / "owt_142m.yaml")
    assert "not found" in refusal(path=tmp_path / "x.yaml")
    assert "cannot read" in refusal(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(path=tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "is no config" in refusal(path=tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "is no config" in refusal(path=tmp_path / "empty.yaml")


# ---- configs/, resolving, dumping, comparing --------------------------------------------------------------------

BLOCK_PARAMETERS = {  # of all blocks, from the table of sizes this project plans with
    "wikitext103_124m": 84.9e6,
    "owt_124m": 84.9e6,
    "owt_350m": 308e6,
    "llada_1b": 1233e6,
    "llada_8b": 6979e6,
    "dlm_70b": 68.5e9,
}
TOTAL_PARAMETERS = {"shakespeare_char_tiny": 870_144, "shakespeare_char_scorer": 870_272, "llada_8b": 8_015_581_184}


def parameters(config: Config) -> tuple[int, int]:
    """(blocks, all) by the formula, for a mask that needs no output row where it is the last id."""
    m, v = config.model, config.data.synthetic_vocab_size
    heads = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    block = m.hidden_size * (heads + m.num_heads * m.head_dim) + 3 * m.hidden_size * m.ffn_size + 2 * m.hidden_size
    block += 2 * m.head_dim if m.qk_norm else 0
    outputs = v if v == 126464 else v - 1  # LLaDA's mask lies inside its vocabulary
    tables = v * m.hidden_size + (0 if m.tied else outputs * m.hidden_size)
    heads = m.hidden_size * (m.critic + 2 * m.labels + m.score)
    return m.num_layers * block, m.num_layers * block + tables + m.hidden_size + heads


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_has_its_size_and_round_trips(path, tmp_path):
    config = load_config(path)
    assert config.train.out == f"runs/{path.stem}"
    blocks, total = parameters(config)
    assert blocks == pytest.approx(BLOCK_PARAMETERS.get(path.stem, blocks), rel=2e-3)
    assert total == TOTAL_PARAMETERS.get(path.stem, total)
    is_untied = path.stem in ("quickstart", *TOTAL_PARAMETERS, "gaussian_depth12") or path.stem.startswith("shakespeare_char")
    assert config.model.tied == (total < 4e8 and not is_untied)
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml") == config == config_from_text(dump_config(config), "copy")
    assert yaml.safe_load(dump_config(config))["train"]["wandb"] == "off"  # for readers of YAML 1.1 as well


def test_the_planned_configs_are_there():
    names = "quickstart shakespeare_char shakespeare_char_tiny wikitext103_tiny wikitext103_small wikitext103_124m"
    names += " char_diffusion sft depth12"
    assert set(f"{names} owt_124m owt_350m llada_1b llada_8b dlm_70b".split()) <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize(
    ("given_keys", "derived"),
    [
        ({"hidden_size": 768, "num_heads": 12}, {"num_kv_heads": 12, "head_dim": 64, "ffn_size": 2048, "tied": True}),
        ({"hidden_size": 1024, "num_heads": 16}, {"ffn_size": 2816, "tied": True}),
        ({"hidden_size": 1152, "num_heads": 16}, {"ffn_size": 3072, "tied": False}),
        ({"hidden_size": 4096, "num_heads": 32}, {"head_dim": 128, "ffn_size": 11008, "tied": False}),
        ({"hidden_size": 768, "num_heads": 12, "mlp": "gelu"}, {"ffn_size": 3072}),
        ({"hidden_size": 128, "num_heads": 4, "ffn_size": 100, "tied": False, "head_dim": 64, "num_kv_heads": 2},
         {"ffn_size": 100, "tied": False, "head_dim": 64, "num_kv_heads": 2}),
    ],
)  # fmt: skip
def test_derived_sizes(given_keys, derived):
    model = ModelConfig(num_layers=1, seq_len=8, **given_keys)
    assert {key: getattr(model, key) for key in derived} == derived


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_plain_value_survives_yaml(value):
    text = dump_yaml({"value": value})
    assert parse_yaml(text, "round trip") == {"value": value}


@pytest.mark.parametrize("text", ["3e-4", "off", "1_000", "010", "1:30", "~", "", "2024-01-01", "é", "a\nb", "true"])
def test_a_text_that_looks_like_something_else_stays_a_text(text):
    assert parse_yaml(dump_yaml({"value": text}), "round trip") == {"value": text}


def test_the_difference_of_two_configs():
    old = load_config(TINY)
    new = load_config(
        TINY,
        ["train.seed=2", "train.micro_batch_size=8", "deepspeed.zero_optimization.overlap_comm=true", "data.train=x"],
    )
    difference = config_difference(old, new)
    assert set(difference) == {
        "train.seed", "train.micro_batch_size", "deepspeed.zero_optimization.overlap_comm", "data.train"
    }  # fmt: skip
    assert difference["train.seed"] == (1, 2)
    assert [key for key in difference if not is_result_neutral(key)] == ["train.seed"]
    assert config_difference(old, load_config(TINY)) == {}


def test_what_changes_the_result_is_not_neutral():
    neutral = {key for key in known_keys() if is_result_neutral(key)}
    assert {"train.save_every", "train.stop_at_step", "parallel.tensor_parallel_size", "train.eval_draws"} <= neutral
    assert not any(key.startswith(("model.", "diffusion.", "optimizer.")) for key in neutral)
    assert "data.random_length_share" not in neutral
    assert not neutral & {"train.global_batch_size", "train.num_steps", "train.precision", "train.ema_decay"}


# ---- batch arithmetic -------------------------------------------------------------------------------------------


def with_batch(global_batch: int, micro_batch: int) -> Config:
    config = load_config(TINY)
    train = config.train.model_copy(update={"global_batch_size": global_batch, "micro_batch_size": micro_batch})
    return config.model_copy(update={"train": train})


@settings(max_examples=150)
@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 64))
def test_batch_arithmetic(world, global_batch, micro_batch):
    config = with_batch(global_batch, micro_batch)
    if global_batch % (micro_batch * world) == 0:
        assert resolve_batch(config, world) * micro_batch * world == global_batch
        return
    with pytest.raises(UsageError) as raised:
        resolve_batch(config, world)
    message = str(raised.value)
    assert f"{global_batch} / ({micro_batch} x {world})" in message
    proposals = re.findall(r"train\.global_batch_size=(\d+) train\.micro_batch_size=(\d+)", message)
    assert len(set(proposals)) == 3
    for new_global, new_micro in proposals:
        assert resolve_batch(with_batch(int(new_global), int(new_micro)), world) >= 1


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 16, 4096])
def test_what_divides_is_accepted_for_every_split(world):
    for micro_batch in (1, 2, 5):
        for accumulation in (1, 3, 8):
            config = with_batch(world * micro_batch * accumulation, micro_batch)
            assert resolve_batch(config, world) == accumulation


def test_the_nearest_settings_are_nearest():
    """Against all (global, micro) pairs of a small range."""
    for wanted, micro, ranks in ((32, 16, 3), (33, 16, 1), (30, 7, 4), (5, 4, 8)):
        def change(choice, wanted=wanted, micro=micro):
            return sum(max(a / b, b / a) for a, b in zip(choice, (wanted, micro), strict=True))

        pairs = [(g, m) for m in range(1, 2 * micro + 1) for g in range(m * ranks, 8 * wanted + 64, m * ranks)]
        best = sorted(change(p) for p in pairs)[:3]
        assert [change(c) for c in nearest_batches(wanted, micro, ranks)] == pytest.approx(best)


# ---- cost -------------------------------------------------------------------------------------------------------


def test_refusing_a_config_imports_nothing_heavy():
    code = (
        "import sys\nfrom dlm_scale.config import load_config\nfrom dlm_scale.errors import UsageError\n"
        f"try:\n    load_config({str(TINY)!r}, ['train.num_stps=1'])\nexcept UsageError as e:\n    print(e)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'deepspeed', 'megatron', 'triton'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "did you mean train.num_steps?" in out and out.endswith("[]\n")
