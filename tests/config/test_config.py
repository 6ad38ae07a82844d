"""Configuration files: strict, with messages that say where and what instead; exact numbers; the files in configs/."""

import json
import math
from fractions import Fraction

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megameta.config import DataSection, RunConfig, build_config, config_schema, known_keys, load_config
from megameta.config.validate import problems
from megameta.errors import UserError
from megameta.model import GPT
from megameta.train.run_config import load_run_config
from tests.support.commands import run_command
from tests.support.paths import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  num_step: 5\n", "line 2: train.num_step: unknown key; did you mean train.num_steps?"),
        ("modle: {}\n", "line 1: modle: unknown key; did you mean model?"),
        ("\nnum_layers: 3\n", "line 2: num_layers: unknown key; did you mean model.num_layers?"),
        ("train: {learning_rate: 1}", "train.learning_rate: unknown key"),
        ("model: {meta_layers: all}", "line 1: model.meta_layers: Input should be a list, in brackets (given: 'all')"),
        ("model: {meta_layers: [0, a]}", "line 1: model.meta_layers.1: Input should be a valid integer"),
        ("model:\n  meta_layers: [0, 12]", "line 1: model: meta_layers [0, 12]: there is no layer 12; num_layers 12"),
        ("model: {n_layers: 1}", "model.n_layers: unknown key; did you mean model.num_layers?"),
        ("optimizer: {warmup: 1}", "optimizer.warmup: unknown key"),
        ("train: {zero_stage: 1}", "train.zero_stage: unknown key; did you mean parallel.zero_stage?"),
        ("train: {num_steps: 0}", "train.num_steps: Input should be greater than or equal to 1 (given: 0)"),
        ("train: {num_steps: 1.5}", "train.num_steps: Input should be a valid integer"),
        ("train: {num_steps: yes}", "train.num_steps: true or false"),
        ("train: {precision: fp8}", "train.precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16' (given: 'fp8')"),
        ("train: 5", "train: Input should be a valid dictionary"),
        ("model: {num_heads: 5}", "hidden_size 768 is not a multiple of num_heads 5"),
        ("model: {num_layers: 0}", "num_layers must be at least 1, not 0"),
        ("data: {skip: [3]}", "line 1: data.skip.0: "),
        ("data: {meta_token_fraction: 0.7}", "data.meta_token_fraction: Input should be less than or equal to 0.5"),
        ("optimizer: {lr: .inf}", "optimizer.lr: Input should be a finite number"),
        ("optimizer: {lr: .nan}", "optimizer.lr: Input should be a finite number"),
    ],
)
def test_a_bad_key_or_value_says_where_and_what(file, text, expected):
    said = message(file(text))
    assert said.startswith(str(file(text)))
    assert expected in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {num_steps: 3, num_steps: 4}", "key 'num_steps' is given twice"),
        ("train: {a: 1}\ntrain: {b: 2}", "key 'train' is given twice"),
        ("train: [1,\n  2", "line 2"),
        ("[1, 2]: 3", "a key is a plain word"),
        ("- 1\n- 2", "a configuration is a mapping of sections, not list"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("base: absent.yaml", "absent.yaml: No such file"),
        ("base: run.yaml", "is its own base"),
    ],
)
def test_bad_files(file, text, expected):
    assert expected in message(file(text))


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot read the configuration" in message(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not text in UTF-8" in message(tmp_path / "binary.yaml")
    assert "cannot read the configuration" in message(tmp_path)


def test_all_problems_at_once(file):
    said = message(file("train: {num_steps: 0, foo: 1}\nrun: {sed: 2}\n"))
    assert "3 problem(s)" in said
    assert all(key in said for key in ("train.num_steps", "train.foo", "run.sed: unknown key; did you mean run.seed?"))


def test_bases_merge_and_say_where_a_mistake_stands(file):
    file("\ntrain: {num_steps: 7, micro_batch_size: 2}\ndata: {train: [a, b]}\n", "bottom.yaml")
    (middle := file("x", "sub.yaml")).write_text("base: bottom.yaml\ntrain: {micro_batch_size: 4}\ndata: {train: c}\n")
    config = load_config(file("base: sub.yaml\nrun: {seed: 5}\n"), ["train.global_batch_size=16"])
    assert (config.train.num_steps, config.train.micro_batch_size, config.train.global_batch_size) == (7, 4, 16)
    assert config.data.train == ["c"] and config.run.seed == 5
    middle.write_text("base: bottom.yaml\ntrain:\n  num_steps: -1\n")
    assert "sub.yaml, line 3: train.num_steps" in message(file("base: sub.yaml\n"))
    assert "override train.num_steps=-2: train.num_steps" in message(file("base: sub.yaml\n"), "train.num_steps=-2")
    file("base: other.yaml", "run.yaml")
    assert "is its own base" in message(file("base: run.yaml", "other.yaml"))


def test_overrides(file):
    path = file("train:\noptimizer: {lr: 1e-3}\n")
    config = load_config(
        path,
        [
            "train.num_steps=1e2",
            "optimizer.lr=6e-4",
            "data.train=[a, b]",
            "data.valid={x: [p], y: q}",
            "model.bias=true",
            "deepspeed.zero_optimization.reduce_bucket_size=5e8",
            "run.dir=a=b",
            "data.tokenizer=",
            "optimizer.lr=7e-4",
        ],
    )
    assert config.train.num_steps == 100 and config.optimizer.lr == 7e-4 and config.model.bias is True
    assert config.data.train == ["a", "b"] and config.data.valid == {"x": ["p"], "y": ["q"]}
    assert config.deepspeed["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert config.run.dir == "a=b" and config.data.tokenizer is None
    assert "write it as section.key=value" in message(path, "train.num_steps")
    assert "write it as section.key=value" in message(path, "=5")
    assert "lr is a value, not a section" in message(path, "optimizer.lr.x=5")
    assert "not valid YAML" in message(path, "optimizer.lr=[1")


@pytest.mark.parametrize("text", ["6e-4", "6E-4", "6.0e-4", "0.0006", "+6e-04"])
def test_floats_without_a_point_are_numbers(file, text):
    """YAML 1.1 reads 6e-4 as text."""
    config = load_config(file(f"optimizer: {{lr: {text}}}\ndeepspeed: {{a: {text}}}"))
    assert config.optimizer.lr == 6e-4 == config.deepspeed["a"]


def test_short_forms(file):
    config = load_config(file("data: {train: a, valid: [b, c]}"))
    assert config.data.train == ["a"] and config.data.valid == {"valid": ["b", "c"]}
    assert load_config(file("data: {valid: a}")).data.valid == {"valid": ["a"]}
    assert load_config(file("")) == RunConfig()
    merged = load_config(file("train: &t {num_steps: 3}\ncheckpoint:\n  <<: {interval: 5}\n  keep: 1\n"))
    assert (merged.checkpoint.interval, merged.checkpoint.keep) == (5, 1)


@given(st.integers(0, 500), st.integers(2, 8192))
@example(290, 100)  # 28 in binary
@settings(max_examples=300, deadline=None)
def test_number_of_meta_tokens_is_exact(thousandths, slots):
    """floor(k · T) of the decimal number that was written, not of its binary neighbour."""
    data = DataSection(meta_token_fraction=float(f"0.{thousandths:03d}"), sequence_length=slots)
    assert data.num_meta_tokens == math.floor(Fraction(thousandths, 1000) * slots)
    assert data.text_per_sample + data.num_meta_tokens == slots


def test_values_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().run.seed = 5


def fits(value, schema, definitions):
    """Whether a value is of a JSON schema: as much of one as ours says."""
    if "anyOf" in schema:
        return any(fits(value, part, definitions) for part in schema["anyOf"])
    if "$ref" in schema:
        return fits(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    kinds = {"string": str, "array": list, "object": dict, "number": (int, float), "null": type(None)}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, kinds[kind]) for kind in types):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"], definitions) for item in value)
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", False)
        parts = [known.get(name, rest) for name in value]
        return all(part and fits(item, part, definitions) for part, item in zip(parts, value.values(), strict=True))
    return True


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("train", "a", True),
        ("train", ["a", "b"], True),
        ("train", [0.3, "a", 0.7, "b"], True),
        ("train", {"a": 1, "b": 2.5, "c": None}, True),
        ("train", {"x": {"prefixes": ["a"], "weight": 2}, "y": "b", "z": ["c", "d"]}, True),
        ("train", {"x": {"prefixes": ["a"], "weigth": 2}}, False),
        ("train", {"x": {"a": 1}}, False),
        ("train", 3, False),
        ("valid", "a", True),
        ("valid", {"x": "a", "y": ["b"]}, True),
        ("valid", {"x": 1}, False),
    ],
)
def test_editors_know_the_short_forms(key, value, good):
    definitions = config_schema()["$defs"]
    assert fits(value, definitions["DataSection"]["properties"][key], definitions) == good
    if good:
        build_config({"data": {key: value}})
    else:
        with pytest.raises(UserError):
            build_config({"data": {key: value}})


def test_the_schema_describes_every_key():
    schema = config_schema()
    assert schema["additionalProperties"] is False and "base" in schema["properties"]
    assert set(schema["properties"]) == set(RunConfig().to_dict()) | {"base"}
    for section, values in RunConfig().to_dict().items():
        if section == "deepspeed":
            continue
        name = schema["properties"][section]["$ref"].rpartition("/")[2]
        part = schema["$defs"][name]
        assert part["additionalProperties"] is False, section
        assert set(part["properties"]) == set(values), section
        for key, entry in part["properties"].items():
            assert entry.get("description"), f"{section}.{key} has no description"
    assert schema["$defs"]["TrainSection"]["properties"]["precision"]["enum"] == ["auto", "fp32", "bf16", "fp16"]
    assert schema["$defs"]["OptimizerSection"]["properties"]["lr"]["exclusiveMinimum"] == 0
    json.dumps(schema)
    assert {"run.seed", "model.num_layers", "deepspeed"} <= {key for key, _ in known_keys()}


def round_trip(config, path):
    path.write_text(config.to_yaml(), encoding="utf-8")
    return load_config(path)


def test_what_is_shown_loads_again(tmp_path):
    awkward = {
        "run": {"dir": "1e5", "seed": 0},
        "data": {"train": ["no", "ü", "3"], "valid": {"on": ["0x10"]}, "skip": [[1, 3]], "meta_token_fraction": 1e-05},
        "optimizer": {"lr": 6e-4, "eps": 1e-08, "min_lr": 0.0},
        "deepspeed": {"a": "1e-3", "b": 5e8, "c": 1e-7, "d": None, "e": [1, "2"]},
    }
    for config in (RunConfig(), build_config(awkward)):
        assert round_trip(config, tmp_path / "again.yaml") == config
        assert build_config(yaml.safe_load(config.to_yaml())) == config, "checkpoints are read so"


def test_config_commands(file):
    def run(*arguments):
        return run_command(ROOT, "megameta", "config", *arguments)

    path = file("model: {hidden_size: 32, num_heads: 4, num_layers: 1}\ntrain: {global_batch_size: 12}\n")
    shown = run("show", str(path), "train.num_steps=9000")
    assert shown.returncode == 0, shown.stderr
    again = load_config(file(shown.stdout, "shown.yaml"))
    assert again == load_run_config(path, ["train.num_steps=9000"], need_files=False)
    checked = run("check", str(path), "--gpus", "4", "deepspeed.fp16={enabled: true}", "train.num_steps=3")
    assert checked.returncode == 1 and "Traceback" not in checked.stderr
    for words in ("global_batch_size 12 is not a multiple", "warmup_steps 2000", "deepspeed.fp16: set train.precision"):
        assert words in checked.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT / "configs")) for p in CONFIGS])
def test_the_files_in_configs(path, tmp_path):
    config = load_run_config(path, need_files=False)
    assert round_trip(config, tmp_path / "again.yaml") == config
    paper, scale = path.parent.name == "paper", path.parent.name == "scale"
    for size, device in [(4, "cuda"), (8, "cuda")] if paper or scale else [(1, "cpu"), (2, "cpu")]:
        assert problems(config, world_size=size, device=device) == []
    with torch.device("meta"):
        model = GPT(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    if paper:
        # Spec §2: 123.6 M and 151.9 M with rope; learned positions add 1024 (or 922) rows of 768.
        expected = 151.9e6 if config.model.meta_attention else 123.6e6
        if config.model.position == "ape":
            expected += 768 * config.model.max_position_embeddings
        assert parameters == pytest.approx(expected, rel=1e-3)
        o = config.optimizer
        assert (o.betas, o.weight_decay, o.clip_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
        scaled = config.model.position_scaling_factor
        if config.model.position_scaling == "none":
            assert config.train.global_batch_size * 1024 == 12 * 40 * 1024
            assert (config.train.num_steps, o.lr, o.min_lr, o.warmup_steps) == (200_000, 6e-4, 6e-5, 2000)
        else:  # goes on from the end of the pre-training
            assert config.train.global_batch_size * 1024 * scaled == pytest.approx(12 * 40 * 1024, rel=0.07)
            assert (config.train.num_steps, o.lr, o.min_lr, o.warmup_steps) == (2000, 6e-5, 6e-6, 100)
            assert config.data.sequence_length == config.model.max_position_embeddings == 1024 * scaled
            assert config.model.original_max_position_embeddings == 1024
            assert config.init.from_checkpoint == "runs/paper-meta-rope" != config.run.dir
    elif scale:
        branch = sum(p.numel() for name, p in model.named_parameters() if "meta" in name)
        assert parameters - branch == pytest.approx({"1.3b.yaml": 1.31e9, "7b.yaml": 6.65e9}[path.name], rel=5e-3)
    else:
        assert parameters < 60e6, "meant for a CPU"


def test_there_are_configs():
    wanted = {"meta-rope.yaml", "meta-ape.yaml", "gpt2-ape.yaml", "meta-rope-yarn4.yaml", "meta-rope-yarn8.yaml"}
    assert wanted <= {p.name for p in CONFIGS}
