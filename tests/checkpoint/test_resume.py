"""What a run that goes on may change."""

import pytest

from megameta.checkpoint import check_resumable
from megameta.config import build_config, settle
from megameta.engine.build import DrawnWeights, build_model
from megameta.errors import UserError

BASE = {"data": {"train": "x", "tokenizer": None}, "deepspeed": {"zero_optimization": {"overlap_comm": False}}}


def changed(*overrides):
    from megameta.config import apply_overrides

    return settle(build_config(apply_overrides(BASE, list(overrides))), "cpu")


@pytest.mark.parametrize(
    "override",
    [
        "train.num_steps=7777",
        "train.micro_batch_size=4",
        "train.activation_checkpointing=true",
        "optimizer.min_lr=1e-5",
        "optimizer.schedule=wsd",
        "optimizer.decay_steps=3",
        "data.skip=[[1, 2]]",
        "data.valid=[y]",
        "data.valid={a: [y], b: z}",
        "parallel.zero_stage=3",
        "checkpoint.interval=5",
        "checkpoint.keep=5",
        "eval.interval=5",
        "eval.num_samples=5",
        "log.tensorboard=false",
        "run.dir=elsewhere",
        "init.from_checkpoint=there",
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.dump_state=true",
    ],
)
def test_may_change(override):
    assert changed(override) != changed(), "nothing would be shown by a value that is the default"
    check_resumable(changed(), changed(override), "here")
    check_resumable(changed(override), changed(), "here")


@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("optimizer.lr=0.5", "optimizer.lr", "0.0006", "0.5"),
        ("optimizer.betas=[0.9, 0.99]", "optimizer.betas", "[0.9, 0.95]", "[0.9, 0.99]"),
        ("optimizer.warmup_steps=5", "optimizer.warmup_steps", "2000", "5"),
        ("optimizer.clip_grad_norm=2", "optimizer.clip_grad_norm", "1.0", "2.0"),
        ("train.global_batch_size=16", "train.global_batch_size", "8", "16"),
        ("train.precision=bf16", "train.precision", "'fp32'", "'bf16'"),
        ("run.seed=5", "run.seed", "1234", "5"),
        ("data.train=[x, y]", "data.train", "['x']", "['x', 'y']"),
        ("data.sequence_length=512", "data.sequence_length", "1024", "512"),
        ("data.meta_token_fraction=0.2", "data.meta_token_fraction", "0.1", "0.2"),
        ("data.document_mask=true", "data.document_mask", "False", "True"),
        ("model.num_layers=3", "model.num_layers", "12", "3"),
        ("model.meta_attention=false", "model.meta_attention", "True", "False"),
        ("model.meta_layers=[3, 0]", "model.meta_layers", "None", "[0, 3]"),
    ],
)
def test_may_not_change(override, key, old, new):
    with pytest.raises(UserError) as caught:
        check_resumable(changed(), changed(override), "RUN/step_9")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("RUN/step_9: ") and len(lines) == 3
    assert lines[1] == f"  {key}: {old} in the checkpoint, {new} now"
    assert "init.from_checkpoint" in lines[2]


def test_every_key_is_named_at_once():
    with pytest.raises(UserError, match=r"(?s)model\.num_layers.*optimizer\.lr.*run\.seed"):
        check_resumable(changed(), changed("optimizer.lr=1", "run.seed=2", "model.num_layers=1"), "x")


@pytest.mark.parametrize("layers", [("null", "[0]"), ("[0]", "null")], ids=str)
def test_weights_of_a_branch_in_other_layers_do_not_fit(layers):
    small = ("model.vocab_size=50", "model.hidden_size=24", "model.num_layers=2")
    old, new = (changed(*small, f"model.meta_layers={chosen}") for chosen in layers)
    weights = DrawnWeights(old.model, 1)
    build_model(old, weights)
    with pytest.raises(UserError, match="do not fit the model") as caught:
        build_model(new, weights)
    words = "not in this model" if layers[0] == "null" else "missing"
    assert str(caught.value).splitlines()[1:] == [
        f"  blocks.1.meta_attention.{name}_proj.weight: {words}" for name in "koqv"
    ] + [f"  blocks.1.norm_meta.weight: {words}"]
