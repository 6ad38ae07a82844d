"""Exports: opened where megameta cannot be imported, verified, whole or not there, and read back."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megameta.errors import UserError
from megameta.hf import export as export_module
from megameta.hf.export import export_to_hf
from megameta.hf.importer import import_from_hf
from megameta.hf.verify import verify_export
from megameta.tokenizers import load_tokenizer
from tests.support.exports import BASELINE, CASES, padded_batch, small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import case_id, small_config, small_model


def export_small(directory: Path, dtype: torch.dtype | None = None, **changes):
    config = small_config(attention_backend="auto", **changes)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    export_to_hf(config, tensors, directory, dtype=dtype)
    return config, tensors


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a process without megameta finds in an export."""
    return open_elsewhere(tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same of a model whose window YaRN has extended, from less than the probe's length to four times of it."""
    return open_elsewhere(
        tmp_path_factory.mktemp("extended"),
        position_scaling="yarn",
        position_scaling_factor=4.0,
        original_max_position_embeddings=8,
        yarn_beta_fast=0.12,  # a window of 8 holds few turns: so two pairs stay, one is between, one is interpolated
        yarn_beta_slow=0.005,
        max_position_embeddings=32,
        zero_meta_positions=True,
    )


def open_elsewhere(root: Path, **changes) -> dict:
    """Export a model, and open it in a process where megameta cannot be imported."""
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer, tie_embeddings=False, **changes)
    model = small_model(config, torch.float32, vocab_multiple=1).eval()
    with torch.no_grad():  # a model that would like to say nothing but meta-tokens
        model.head.output.weight[config.meta_token_id] = 8 * model.head.output.weight[5]
    card = {"license": "cc-by-4.0", "name": "Tiny", "evaluation": {"perplexity": 12.5}}
    export_to_hf(config, tensors_of(model), root / "export", tokenizer, card, max_shard_size="20KB")
    ids, mask = padded_batch(config)
    with torch.inference_mode():
        save_file({"ids": ids, "mask": mask, "logits": model(ids)}, root / "probe.safetensors")
    script = Path(__file__).with_name("open_export.py")
    process = subprocess.run(
        [sys.executable, str(script), str(root / "export"), str(root / "probe.safetensors"), str(root / "resaved")],
        env={**os.environ, "HF_HOME": str(root / "hf_home"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout.splitlines()[-1])
    return {**found, "root": root, "model_config": config, "tokenizer": tokenizer}


def test_auto_classes_without_megameta(opened: dict) -> None:
    config = opened["model_config"]
    assert opened["config"] == ["MegametaConfig", config.num_layers, config.meta_token_id]
    assert opened["classes"] == ["MegametaModel", "MegametaForCausalLM"]
    assert opened["error"] <= 1e-5 and opened["base_error"] <= 1e-5


def test_an_extended_model_without_megameta(extended: dict) -> None:
    """Equal logits beyond the original window, a cache that agrees, and the scaling in config.json."""
    assert extended["error"] <= 1e-5 and extended["base_error"] <= 1e-5
    assert extended["cache_agrees"] and extended["resaved_equal"]
    saved = json.loads((extended["root"] / "export" / "config.json").read_text())
    wanted = {"position_scaling": "yarn", "position_scaling_factor": 4.0, "original_max_position_embeddings": 8}
    assert {key: saved[key] for key in wanted} == wanted
    probe = load_file(extended["root"] / "probe.safetensors")
    plain = dataclasses.replace(
        extended["model_config"],
        position_scaling="none",
        position_scaling_factor=1.0,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
    )
    assert probe["ids"].shape[1] > 8
    model = small_model(plain, torch.float32, vocab_multiple=1).eval()
    with torch.inference_mode():
        other = model(probe["ids"])
    assert float((other - probe["logits"]).abs().max()) > 1e-2 * float(probe["logits"].abs().max()), "scaling matters"


def test_a_cache_that_drops_rows_without_megameta(opened: dict) -> None:
    assert opened["pruned_agrees"]
    assert opened["pruned_rows"] <= 4 + 1 + 1  # sinks, the window without the next row, the meta-token


def test_tokenizer_of_the_export_parses_the_meta_token(opened: dict) -> None:
    assert opened["ids"] == opened["tokenizer"].encode_prompt("the<|meta|> sea")
    assert opened["ids"].count(opened["model_config"].meta_token_id) == 1
    assert opened["pad"] == [opened["tokenizer"].eod_id] * 2
    saved = load_tokenizer(opened["root"] / "export")
    assert saved.encode_prompt("the<|meta|> sea") == opened["ids"]


def test_generation_suppresses_the_meta_token(opened: dict) -> None:
    assert opened["generated_meta"] == 0 < opened["generated_meta_unsuppressed"]
    assert opened["left_padded"] and opened["cache_agrees"] and opened["static_agrees"]


def test_training_and_saving_again(opened: dict) -> None:
    assert opened["losses"][0] > opened["losses"][1] > opened["losses"][2]
    assert opened["resaved_equal"]
    assert opened["resaved_suppresses"] == [opened["model_config"].meta_token_id]
    resaved = opened["root"] / "resaved"
    assert (resaved / "modeling_megameta.py").read_bytes() == (
        opened["root"] / "export" / "modeling_megameta.py"
    ).read_bytes()
    assert import_from_hf(resaved).config.vocab_size == opened["model_config"].vocab_size  # and can be read back


def test_the_collator_comes_with_the_model(opened: dict) -> None:
    assert opened["collated"] == [8, 32, opened["tokenizer"].eod_id]


def test_initial_weights_of_remote_code(opened: dict) -> None:
    assert abs(opened["fresh_std"] * 6**0.5 / 0.02 - 1) < 0.1


def test_files(opened: dict) -> None:
    directory = opened["root"] / "export"
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1 and (directory / "model.safetensors.index.json").is_file()
    assert {path.stat().st_mode & 0o777 for path in shards} == {(directory / "config.json").stat().st_mode & 0o777}
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_megameta.MegametaConfig",
        "AutoModel": "modeling_megameta.MegametaModel",
        "AutoModelForCausalLM": "modeling_megameta.MegametaForCausalLM",
    }
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [opened["model_config"].meta_token_id]
    assert generation["eos_token_id"] == opened["tokenizer"].eod_id
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "license: cc-by-4.0\n" in card
    assert "# Tiny\n" in card and "| perplexity | 12.5 |" in card and "trust_remote_code=True" in card
    names = {path.suffix for path in directory.iterdir()}
    assert names == {".md", ".json", ".py", ".safetensors"}
    assert [path.name for path in opened["root"].iterdir() if path.name.startswith(".")] == []


#: Each case with a type of its own, in one file and in many; every type and size meets many cases.
FORMS = [
    (case, dtype, size)
    for number, case in enumerate([*CASES, *({**BASELINE, "bias": bias} for bias in (False, True))])
    for dtype, size in [
        (None, "5GB"),
        ((torch.float32, torch.bfloat16, torch.float16)[number % 3], ("20KB", "5GB")[number // 3 % 2]),
    ]
]


@pytest.mark.parametrize(
    ("case", "dtype", "size"), FORMS, ids=[f"{case_id(case)}-{dtype}-{size}" for case, dtype, size in FORMS]
)
def test_round_trip_is_bitwise(case: dict, dtype: torch.dtype | None, size: str, tmp_path: Path) -> None:
    """16-bit weights come back widened; exported again in their type, they are the same files."""
    config = small_config(attention_backend="auto", **case)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    place, again = tmp_path / "export", tmp_path / "again"
    export_to_hf(config, tensors, place, dtype=dtype, max_shard_size=size)
    assert (place / "model.safetensors.index.json").exists() == (size == "20KB")
    imported = import_from_hf(place)
    assert imported.config == config and imported.tokenizer_dir is None
    assert imported.tensors.keys() == tensors.keys()
    assert all(torch.equal(imported.tensors[name], tensors[name].to(dtype).float()) for name in tensors)
    if dtype is not None:
        export_to_hf(imported.config, imported.tensors, again, dtype=dtype, max_shard_size=size)
        assert {path.name: path.read_bytes() for path in again.iterdir()} == {
            path.name: path.read_bytes() for path in place.iterdir()
        }


#: What docs/conversion.md says is converted. Without the branch the meta-tokens, if there are any, are pause tokens.
VARIANTS: list[dict] = [
    *({"position": p, "meta_attention": branch} for p in ("rope", "ape", "none", "rnope") for branch in (True, False)),
    *({"position_scaling": scaling} for scaling in ("yarn", "ntk", "linear")),
    {"meta_layers": (1,)}, {"zero_meta_positions": True}, {"zero_meta_embedding": True}, {"norm": "rmsnorm"},
    {"bias": True}, {"activation": "swiglu"}, {"activation": "gelu_tanh"}, {"qk_norm": True},
    {"parallel_residual": True}, {"num_key_value_heads": 2}, {"rotary_fraction": 0.5}, {"tie_embeddings": False},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_is_among_the_forms(variant: dict) -> None:
    """In its own type, in a type that was chosen, in one file: so the round trip above speaks of each."""
    found = [(dtype, size) for case, dtype, size in FORMS if variant.items() <= case.items()]
    assert {None} < {dtype for dtype, _ in found} and "5GB" in {size for _, size in found}


def test_every_type_meets_many_files_and_one() -> None:
    types = {torch.float32, torch.bfloat16, torch.float16}
    assert {(dtype, size) for _, dtype, size in FORMS} >= {(dtype, size) for dtype in types for size in ("20KB", "5GB")}


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
def test_a_model_trained_with_flash_attn_is_exported_anywhere(baseline: dict, tmp_path: Path) -> None:
    config = small_config(**baseline)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    trained = dataclasses.replace(config, attention_backend="flash")
    export_to_hf(trained, tensors, tmp_path / "export")
    assert import_from_hf(tmp_path / "export").config == dataclasses.replace(config, attention_backend="auto")


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
def test_bfloat16(baseline: dict, tmp_path: Path) -> None:
    _, tensors = export_small(tmp_path / "export", torch.bfloat16, **baseline)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    imported = import_from_hf(tmp_path / "export").tensors
    assert all(torch.equal(imported[name], tensors[name].bfloat16().float()) for name in tensors)


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
def test_verification_refuses_a_damaged_weight(baseline: dict, tmp_path: Path) -> None:
    config, tensors = export_small(tmp_path / "export", **baseline)
    verify_export(tmp_path / "export", config, tensors)
    path = tmp_path / "export" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if "embed" in name or "wte" in name)
    stored[name][7, 3] += 1e-3
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"verification of .* failed: {name} as reloaded"):
        verify_export(tmp_path / "export", config, tensors)
    del stored[next(name for name in stored if "down_proj" in name or "mlp.c_proj" in name)]
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"on reloading, missing_keys"):
        verify_export(tmp_path / "export", config, tensors)


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
def test_verification_refuses_another_computation(baseline: dict, tmp_path: Path) -> None:
    config, tensors = export_small(tmp_path / "export", **baseline)
    path = tmp_path / "export" / "config.json"
    name = "layer_norm_epsilon" if baseline else "norm_eps"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 1e-2}))
    with pytest.raises(UserError, match="logits differ from the training model's"):
        verify_export(tmp_path / "export", config, tensors)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = export_module.bundle_source()
    wrong = source.replace("torch.cat((-high, low), dim=-1) * sin", "torch.cat((high, low), dim=-1) * sin")
    assert wrong != source
    monkeypatch.setattr(export_module, "bundle_source", lambda: wrong)
    with pytest.raises(UserError, match="logits differ"):
        export_small(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_refused(tmp_path: Path) -> None:
    config = small_config()
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    tensors["blocks.1.mlp.up_proj.weight"] *= float("inf")
    with pytest.raises(UserError):
        export_to_hf(config, tensors, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    config = small_config()
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    tensors["blocks.0.mlp.up_proj.weight"] *= 1e6
    with pytest.raises(UserError, match="too large for the type"):
        export_to_hf(config, tensors, tmp_path / "export", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    export_to_hf(config, tensors, tmp_path / "export", dtype=torch.bfloat16)


def test_existing_output(tmp_path: Path) -> None:
    export_small(tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()
    config = small_config(num_layers=1)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    with pytest.raises(UserError, match="exists already"):
        export_to_hf(config, tensors, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    export_to_hf(config, tensors, tmp_path / "export", overwrite=True)
    assert import_from_hf(tmp_path / "export").config.num_layers == 1
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a HuggingFace model directory"):
        export_to_hf(config, tensors, tmp_path / "other", overwrite=True)
    (tmp_path / "empty").mkdir()
    export_to_hf(config, tensors, tmp_path / "empty")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    with pytest.raises(UserError, match="the tokenizer has 289 entries"):
        export_to_hf(
            small_config(), tensors_of(small_model(small_config(), vocab_multiple=1)), tmp_path / "a", tokenizer
        )
    padded = {**tensors, "embedding.tokens.weight": torch.zeros(384, 32)}
    with pytest.raises(UserError, match=r"embedding.tokens.weight has shape \(384, 32\), not"):
        export_to_hf(config, padded, tmp_path / "a")
    with pytest.raises(UserError, match=r"head\.norm\.weight is missing"):
        export_to_hf(config, {n: t for n, t in tensors.items() if n != "head.norm.weight"}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        import_from_hf(tmp_path)
    export_small(tmp_path / "export")
    path = tmp_path / "export"
    config = (path / "config.json").read_text()
    for text, message in [
        ("{", "not valid JSON"),
        ('{"model_type": "bert"}', "type 'bert' cannot be imported"),
        (config.replace('"num_attention_heads": 4', '"num_attention_heads": 3'), "not a multiple"),
        (config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "is missing"),
    ]:
        (path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            import_from_hf(path)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="not readable as safetensors"):
        import_from_hf(path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors are read"):
        import_from_hf(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(UserError, match="points out of its directory"):
        import_from_hf(path)
