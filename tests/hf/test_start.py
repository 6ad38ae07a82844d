"""GPT-2 and GPT-NeoX from elsewhere as a start: step 0 computes what transformers computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from megameta.checkpoint import load_weights
from megameta.config import build_config
from megameta.config.validate import problems
from megameta.engine.build import build_model, initial_weights
from megameta.errors import UserError
from megameta.hf.convert import hf_to_checkpoint
from megameta.hf.importer import import_from_hf, read_hf_model
from megameta.hf.start import start_weights
from megameta.model import GPT, ModelConfig
from megameta.train.run_config import load_run_config
from tests.support.exports import small_tokenizer
from tests.support.models import assert_close

ROWS = 61
#: Shapes that would show a transposed matrix, heads in the wrong order, or a rotation of the wrong channels.
GPT2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "n_inner": 40}
NEOX = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, exact gelu, other epsilon, untied": (
        "gpt2",
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "gpt2, inner width by default": ("gpt2", {"n_inner": None, "activation_function": "gelu_pytorch_tanh"}),
    "pythia": ("neox", {}),
    "neox, half rotated, tanh": (
        "neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
         "hidden_act": "gelu_new"},
    ),
    "neox, in sequence, tied": ("neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "neox, attention without biases": ("neox", {"attention_bias": False, "layer_norm_eps": 1e-3}),
}  # fmt: skip


def make_source(directory: Path, kind: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model whose every weight matters, saved there and returned in float64."""
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(**{**GPT2, **changes}, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None)
        )
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**NEOX, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = 0.3 * value + (0.0 if name.endswith("bias") else 1.0)
            else:
                value = value * (1.0 if "emb" in name or "wte" in name or "wpe" in name else parameter.shape[0] ** -0.5)
            parameter.copy_(value)
    model.save_pretrained(directory)
    return model.double().eval()


def write_config(folder: Path, source: Path, **sections: Any) -> Path:
    values = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "data": {"train": ["x"], "sequence_length": 16},
        "train": {"num_steps": 4, "micro_batch_size": 2, "global_batch_size": 2},
        "optimizer": {"warmup_steps": 1},
        "init": {"from_hf": str(source)},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def at_step_0(path: Path) -> GPT:
    """The model that a run of this configuration starts with, in float64."""
    config = load_run_config(path)
    from megameta.parallel.topology import Topology

    return build_model(config, initial_weights(config, Topology())).double().eval()


def text(rows: int = 4, length: int = 20) -> Tensor:
    return torch.randint(0, ROWS, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_0_is_the_source(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    source = make_source(tmp_path / "source", kind, **changes)
    model = at_step_0(write_config(tmp_path, tmp_path / "source"))
    assert model.config.vocab_size == ROWS + 1 and model.config.meta_token_id == ROWS
    assert model.config.meta_attention and model.config.meta_layers is None
    token_BT = text()
    with torch.no_grad():
        theirs, ours = source(token_BT).logits, model(token_BT)
        # rotations are float32 in both
        assert_close(ours[..., :ROWS], theirs, 1e-12 if kind == "gpt2" else 2e-7, variant)
        # The added row takes next to nothing of the probability: its logit is the mean of the others.
        assert_close(
            ours[..., ROWS], theirs.mean(dim=-1), 1e-6, "the meta-token's logit", scale=float(theirs.abs().max())
        )
        rise = theirs.log_softmax(-1) - ours.log_softmax(-1)[..., :ROWS]
        assert float(rise.min()) > -1e-6
        assert float(rise.max()) <= math.log(1 + 1 / ROWS) + 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
@pytest.mark.parametrize("tie", [True, False])
def test_step_0_with_meta_tokens_is_the_source_with_one_more_row(kind: str, tie: bool, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", kind, tie_word_embeddings=tie)
    model = at_step_0(write_config(tmp_path, tmp_path / "source"))
    source.resize_token_embeddings(ROWS + 1, mean_resizing=False)
    with torch.no_grad():
        for table in {source.get_input_embeddings().weight, source.get_output_embeddings().weight}:
            table[ROWS] = table[:ROWS].mean(dim=0)
        token_BT = text()
        token_BT[:, [0, 3, 4, 11, 19]] = ROWS
        assert_close(model(token_BT), source(token_BT).logits, 3e-7)
        # The branch is there, and can learn: its inner projections are drawn, the outer one gets a gradient.
        branch = model.blocks[1].meta_attention
        assert branch.q_proj.weight.std() > 0.01 and not branch.o_proj.weight.any()
    model(token_BT).logsumexp(-1).sum().backward()
    assert branch.o_proj.weight.grad.abs().max() > 0


def test_the_branch_follows_the_seed_and_may_stand_in_some_layers(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "gpt2")
    first = at_step_0(write_config(tmp_path, tmp_path / "source", model={"meta_layers": [1]}, run={"seed": 1}))
    second = at_step_0(write_config(tmp_path, tmp_path / "source", model={"meta_layers": [1]}, run={"seed": 2}))
    assert [block.meta_attention is not None for block in first.blocks] == [False, True, False]
    one, other = (model.blocks[1].meta_attention.q_proj.weight for model in (first, second))
    assert not torch.equal(one, other)
    without = at_step_0(write_config(tmp_path, tmp_path / "source", model={"meta_attention": False}))
    with torch.no_grad():
        assert torch.equal(without(text()), first(text()))


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_shards_types_and_buffers_of_other_writers(kind: str, tmp_path: Path) -> None:
    """The hub's files: float16, several files, the old names, causal masks among the weights."""
    source = make_source(tmp_path / "source", kind)
    source.half().save_pretrained(tmp_path / "half", max_shard_size="30KB")
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    # not .double(), which would bring back frequencies that were rounded to float16
    source = type(source).from_pretrained(tmp_path / "half", dtype=torch.float64).eval()
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if kind == "gpt2":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")  # as transformers 5 calls it in memory
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e4)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / "model.safetensors")
    (old / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    with torch.no_grad():
        theirs = source(text()).logits
        for directory in (tmp_path / "half", old):
            assert_close(at_step_0(write_config(tmp_path, directory))(text())[..., :ROWS], theirs, 2e-7, directory.name)


def test_configurations_before_transformers_5(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "neox")
    path = tmp_path / "source" / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    assert rope["partial_rotary_factor"] == 0.25
    values |= {"rotary_pct": 0.25, "rotary_emb_base": 10000, "rope_scaling": None}
    path.write_text(json.dumps(values))
    with torch.no_grad():
        ours = at_step_0(write_config(tmp_path, tmp_path / "source"))(text())
        assert_close(ours[..., :ROWS], source(text()).logits, 2e-7)


# --- the configuration ----------------------------------------------------------------------------------------------


def test_the_model_section_is_derived(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "neox")
    model = load_run_config(write_config(tmp_path, tmp_path / "source")).model
    wanted = {
        "hidden_size": 48, "num_layers": 3, "num_heads": 3, "intermediate_size": 56, "position": "rope",
        "rotary_fraction": 0.25, "bias": True, "parallel_residual": True, "tie_embeddings": False,
        "max_position_embeddings": 24, "meta_attention": True, "vocab_size": ROWS + 1,
    }  # fmt: skip
    assert {key: getattr(model, key) for key in wanted} == wanted
    longer = load_run_config(write_config(tmp_path, tmp_path / "source"), ["data.sequence_length=48"]).model
    assert longer.max_position_embeddings == 48


def test_what_contradicts_the_source_is_told_at_once(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "gpt2")
    given = {"hidden_size": 64, "num_layers": 3, "position": "rope", "bias": False, "meta_layers": [0]}
    path = write_config(tmp_path, tmp_path / "source", model=given)
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    message = str(caught.value)
    for part in (
        "model.hidden_size: 64 in the configuration, 32 in the source",
        "model.position: 'rope' in the configuration, 'ape' in the source",
        "model.bias: False in the configuration, True in the source",
    ):
        assert part in message
    assert "num_layers" not in message and "meta_layers" not in message
    both = load_run_config(write_config(tmp_path, tmp_path / "source", init={"from_checkpoint": "x"}))
    assert any("both say where the weights start" in problem for problem in problems(both, world_size=1, device="cpu"))
    long = load_run_config(write_config(tmp_path, tmp_path / "source", data={"sequence_length": 32}))
    assert any("learned positions end there" in problem for problem in problems(long, world_size=1, device="cpu"))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*nowhere/config\.json"):
        load_run_config(path)
    assert load_run_config(path, need_files=False).init.from_hf == str(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', and only gelu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, and only False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, and only True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("neox", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "of the type 'linear'"),
        ("neox", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "of the type 'yarn'"),
        ("neox", {"model_type": "llama"}, "type 'llama' cannot be imported"),
        ("neox", {"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
        ("neox", {"num_attention_heads": 5}, "not a multiple of num_heads 5"),
        ("neox", {"num_attention_heads": 0}, "config.json"),
        ("gpt2", {"n_embd": "wide"}, "config.json"),
    ],
    ids=str,
)
def test_what_cannot_be_represented_is_refused(kind: str, changes: dict, said: str, tmp_path: Path) -> None:
    make_source(tmp_path / "source", kind)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        read_hf_model(tmp_path / "source")


# --- the tokenizer --------------------------------------------------------------------------------------------------


def with_tokenizer(directory: Path, rows_more: int = 0, **changes: Any) -> Any:
    """A source with a stock tokenizer of its vocabulary beside it, which has no meta-token, and unused rows."""
    tokenizer = small_tokenizer()
    source = make_source(directory, "gpt2", vocab_size=tokenizer.meta_token_id + rows_more, **changes)
    saved = json.loads(tokenizer._backend.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] != "<|meta|>"]
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return source


@pytest.mark.parametrize("rows_more", [0, 1, 7])
def test_the_sources_tokenizer_gets_the_meta_token(rows_more: int, tmp_path: Path) -> None:
    """ids stay; rows that no token has are left out, and so the meta-token is the last row."""
    source = with_tokenizer(tmp_path / "source", rows_more)
    tokenizer = small_tokenizer()
    config = load_run_config(write_config(tmp_path, tmp_path / "source"))
    assert config.data.tokenizer == str(tmp_path / "source")
    assert (config.model.vocab_size, config.model.meta_token_id) == (tokenizer.vocab_size, tokenizer.meta_token_id)
    model = at_step_0(tmp_path / "run.yaml")
    ids = torch.tensor([tokenizer.encode("the old man and the sea")[:20]])
    with torch.no_grad():
        rows = tokenizer.meta_token_id
        assert_close(model(ids)[..., :rows], source(ids).logits[..., :rows], 1e-12)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with_tokenizer(tmp_path / "source")
    ours = small_tokenizer()
    ours.save(tmp_path / "same")
    same = load_run_config(write_config(tmp_path, tmp_path / "source", data={"tokenizer": str(tmp_path / "same")}))
    assert same.model.vocab_size == ours.vocab_size
    values = json.loads((tmp_path / "same" / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    first, second = [token for token, index in vocab.items() if index in (40, 41)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"data\.tokenizer is not the tokenizer of .*its ids are not those"):
        load_run_config(write_config(tmp_path, tmp_path / "source", data={"tokenizer": str(tmp_path / "same")}))
    make_source(tmp_path / "small", "gpt2")
    with pytest.raises(UserError, match=r"entries, and the source 61 rows"):
        load_run_config(write_config(tmp_path, tmp_path / "small", data={"tokenizer": str(tmp_path / "source")}))


# --- exports, and checkpoints of a source ---------------------------------------------------------------------------


def test_a_checkpoint_of_a_source(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "neox")
    hf_to_checkpoint(tmp_path / "source", tmp_path / "checkpoint")
    config, tensors = load_weights(tmp_path / "checkpoint")
    expected = start_weights(tmp_path / "source", config.model, config.run.seed)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert config.model.meta_attention and config.model.vocab_size == ROWS + 1
    with pytest.raises(UserError, match=r"was not exported by megameta.*init\.from_hf="):
        import_from_hf(tmp_path / "source")


def test_an_export_is_a_start_too(tmp_path: Path) -> None:
    from megameta.hf.export import export_to_hf
    from tests.support.exports import BASELINE, tensors_of, tokenizer_config
    from tests.support.models import small_model

    tokenizer = small_tokenizer()
    for name, changes in {"meta": {"qk_norm": True, "meta_layers": (0,)}, "gpt2": BASELINE}.items():
        config = tokenizer_config(tokenizer, **changes)
        model = small_model(config, torch.float32, vocab_multiple=1)
        export_to_hf(config, tensors_of(model), tmp_path / name, tokenizer)
        assert load_run_config(write_config(tmp_path, tmp_path / name)).model.meta_attention == config.meta_attention
        token_BT = torch.arange(20)[None]
        wider = {"meta_attention": True, "meta_layers": [0, 1]}
        for chosen in ({}, wider):  # the branch in a layer that had none adds nothing
            started = at_step_0(write_config(tmp_path, tmp_path / name, model=chosen))
            with torch.no_grad():
                token_BT[0, 3:7] = tokenizer.meta_token_id
                assert_close(started(token_BT), model.double()(token_BT), 1e-12)
    with pytest.raises(UserError, match=r"blocks.0.meta_attention.k_proj.weight: not in this model"):
        at_step_0(write_config(tmp_path, tmp_path / "meta", model={"meta_layers": [1]}))


def test_model_config_is_built_from_plain_values(tmp_path: Path) -> None:
    """What config show prints is a configuration that says the same without the source."""
    make_source(tmp_path / "source", "gpt2")
    config = load_run_config(write_config(tmp_path, tmp_path / "source"))
    assert build_config(config.to_dict()) == config and isinstance(config.model, ModelConfig)
