"""An export under transformers' Trainer and PEFT, by the code that lies in it: megameta's loss, and what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.hf.export import export_to_hf
from megameta.hf.importer import import_from_hf
from megameta.model import GPT
from tests.support.exports import small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import assert_close, small_model

pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[dev]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install -e '.[dev]')")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer)
    model = small_model(config, torch.float32, vocab_multiple=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3 if parameter.ndim == 2 else 1.0  # a start that can be improved on in a few steps
    directory = tmp_path_factory.mktemp("trainer") / "export"
    return export_to_hf(config, tensors_of(model), directory, tokenizer)


def load(export: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)


def sequences(count: int = 48) -> list[dict[str, list[int]]]:
    """Counting, from different numbers and of different lengths."""
    return [{"input_ids": [20 + (start * 7 + i) % 40 for i in range(12 + start % 9)]} for start in range(count)]


class Recording:
    """The collator, and what it has made."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.batches = collator, []

    def __call__(self, features: Any) -> dict[str, Tensor]:
        batch = self.collator(features)
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def train(model: Any, output: Path, steps: int = 8, **arguments: Any) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses by step, and the micro-batches: two a step."""
    from transformers import Trainer, TrainingArguments

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    collator = base.meta_token_collator(fraction=0.2, seed=3)
    recording = Recording(collator)
    settings = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, max_grad_norm=1.0, weight_decay=0.0, **arguments,
    )  # fmt: skip
    trainer = Trainer(
        model, settings, data_collator=recording, train_dataset=sequences(), callbacks=[collator.epoch_callback()]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], recording.batches


def training_loss(export: Path, batches: list[dict[str, Tensor]]) -> float:
    """megameta's own: the sum over all targets of a step over their number, by the training model."""
    config, tensors, *_ = import_from_hf(export)
    model = GPT(config, vocab_multiple=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        total, count = 0.0, 0
        for batch in batches:
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                token_T = row[mask.bool()]
                target_T = token_T[1:].masked_fill(token_T[1:] == config.meta_token_id, -100)
                logits = model(token_T[None])[0, :-1]
                total += float(F.cross_entropy(logits, target_T, ignore_index=-100, reduction="sum"))
                count += int((target_T != -100).sum())
    return total / count


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trainer(precision: str, export: Path, tmp_path: Path) -> None:
    model = load(export)
    halves = precision == "bfloat16"
    losses, batches = train(model, tmp_path, gradient_checkpointing=True, bf16=halves)
    assert type(model).__module__.startswith("transformers_modules"), "the code in the export was to be trained"
    assert losses[0] == pytest.approx(training_loss(export, batches[:2]), rel=2e-2 if halves else 2e-5)
    assert losses[-1] < 0.8 * losses[0] and losses[-1] < min(losses[:3])
    assert all((batch["input_ids"] == model.config.meta_token_id).any() for batch in batches)
    # 48 sequences are 12 micro-batches: the second epoch has other places for the same text.
    assert len(batches) > 12
    first, second = (
        {tuple(row[row != model.config.meta_token_id].tolist()): row.tolist() for b in part for row in b["input_ids"]}
        for part in (batches[:12], batches[12:16])
    )
    shared = [text for text in second if text in first]
    assert shared and any(first[text] != second[text] for text in shared)


BOTH = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_lora_on_both_branches(export: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    before = {name: tensor.clone() for name, tensor in load(export).state_dict().items()}
    model = get_peft_model(load(export), LoraConfig(r=4, lora_alpha=16, target_modules=BOTH, task_type="CAUSAL_LM"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 4 * 2 and all("lora_" in name for name in trainable)
    assert any(".meta_attention." in name for name in trainable)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, batches = train(model, tmp_path / "run", gradient_checkpointing=True)
    assert losses[0] == pytest.approx(training_loss(export, batches[:2]), rel=2e-5)  # adapters begin as nothing
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in trainable), name

    model.eval()
    batch = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        adapted = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.suffix for path in (tmp_path / "adapter").iterdir()) == [".json", ".md", ".safetensors"]
    again = PeftModel.from_pretrained(load(export), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, adapted)
        assert not torch.allclose(load(export)(**batch).logits, adapted, atol=1e-2)
    merged = again.merge_and_unload()
    with torch.no_grad():
        assert_close(merged(**batch).logits, adapted, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    imported = import_from_hf(tmp_path / "merged").tensors
    for name in ("blocks.0.attention.q_proj.weight", "blocks.1.meta_attention.o_proj.weight"):
        assert not torch.equal(imported[name], before[f"model.{name}"])
    assert torch.equal(imported["blocks.0.mlp.up_proj.weight"], before["model.blocks.0.mlp.up_proj.weight"])


def test_lora_in_bf16(export: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(export), LoraConfig(r=4, lora_alpha=16, target_modules=BOTH, task_type="CAUSAL_LM"))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, batches = train(model, tmp_path, gradient_checkpointing=True, bf16=True)
    assert losses[0] == pytest.approx(training_loss(export, batches[:2]), rel=2e-2)
    assert losses[-1] < 0.95 * losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == {name for name in start if "lora_" in name}, "every adapter of both branches, and nothing else"


def test_lora_on_the_meta_branch_leaves_plain_text_alone(export: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*\.meta_attention\.[qkvo]_proj"
    model = get_peft_model(load(export), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    train(model, tmp_path, steps=3)
    model.eval()
    text = torch.tensor([sequences()[5]["input_ids"]])
    marked = text.clone()
    marked[0, [2, 5]] = model.get_base_model().config.meta_token_id
    base = load(export).eval()
    with torch.no_grad():
        assert torch.equal(model(text).logits, base(text).logits)
        assert not torch.equal(model(marked).logits, base(marked).logits)
