"""The model card says what the run's own files say, up to the checkpoint that is exported."""

import json
from pathlib import Path

import pytest
import torch

from megameta.checkpoint import TrainerState, write_checkpoint
from megameta.config import build_config
from megameta.errors import UserError
from megameta.hf.convert import checkpoint_to_hf
from tests.support.exports import small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import small_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps whose checkpoint is that of step 12."""
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    model = tokenizer_config(tokenizer)
    values = {
        "model": model.to_dict(),
        "data": {
            "tokenizer": str(tmp_path / "tokenizer"),
            "train": ["/somewhere/private/books_text_document"],
            "sequence_length": 40,
            "meta_token_fraction": 0.1,
        },
        "init": {"from_hf": "/somewhere/private/gpt2"},
    }
    folder = tmp_path / "run"
    weights = tensors_of(small_model(model, torch.float32, vocab_multiple=1))
    state = TrainerState(step=12, next_batch=12, tokens=480_000, targets=431_999, optimizer_step=12)
    write_checkpoint(folder / "checkpoints" / "step_00000012", build_config(values), weights, {}, state)
    (folder / "checkpoints" / "latest").write_text("step_00000012\n")
    lines = [{"step": step, "loss": 8.0 - step / 4, "tokens": step * 40_000} for step in range(1, 21)]
    for step in (6, 12, 18):
        result = {"loss": 7.0 - step / 4, "perplexity": 12.5, "bits_per_byte": None, "targets": 9000}
        lines.insert(step + step // 6 - 1, {"step": step, "eval": {"valid": result, "valid/no-meta": result}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"st')  # killed while writing
    return folder


def audit(folder: Path, contamination: dict | None) -> Path:
    folder.mkdir()
    files = [{"path": "/private/a-0.jsonl", "bytes": 1000, "sha256": "x"}, {"path": "/private/a-1.jsonl", "bytes": 500}]
    inputs = [{"path": "/private/a-*.jsonl", "source": "books", "documents": 1234, "files": files}]
    manifest = {"schema": "megameta.audit.manifest/1", "corpus_hash": "abc123", "inputs": inputs}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = {
        "duplicates": {"exact": {"copies": 3}, "normalised": {"copies": 4}, "near": {"copies": 5}},
        "documents_with": {"secrets": 1, "personal": 2},
        "filter": {"dropped": 7, "read": 1241},
        "contamination": contamination,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_numbers_are_those_of_the_checkpoint(named: str, run: Path) -> None:
    source = run if named == "run" else run / "checkpoints" / "step_00000012"
    output = checkpoint_to_hf(source, run.parent / "hf")
    card = (output / "README.md").read_text()
    for row in (
        "| started from | gpt2 (HuggingFace) |",
        "| steps | 12 |",
        "| slots seen, meta-tokens included | 480,000 |",
        "| text tokens seen | 432,000 |",
        "| targets that counted | 431,999 |",
        "| training loss of the last step (nats) | 5 |",
        "- books_text_document",
        "On held-out text, at step 12. `/no-meta` is the same text without meta-tokens.",
        "| valid | 4.0000 | 12.5000 | – | 9,000 |",
        "| 5–6 | 240,000 | 6.6250 | 5.5000 | 5.5000 |",  # 12 steps in 10 rows: these two are one
        "| 11–12 | 480,000 | 5.1250 | 4.0000 | 4.0000 |",
        "| 1 | 40,000 | 7.7500 |  |  |",
        "No audit of the training data was given",
    ):
        assert row in card, row
    assert "private" not in card and "13" not in card.split("## Loss")[1].split("## Configuration")[0]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG") and "(loss.png)" in card
    assert (output / "loss.png").stat().st_size < 60_000


def test_the_audit(run: Path) -> None:
    place = audit(run.parent / "audit", {"sets": {"lambada": {"contaminated": 12, "examples": 5153}}})
    card = (checkpoint_to_hf(run, run.parent / "hf", audit=str(place)) / "README.md").read_text()
    for row in (
        "| books: a-*.jsonl | 1,234 documents, 1,500 bytes |",
        "| hash of all texts | abc123 |",
        "| copies, near | 5 |",
        "| documents with personal data | 2 |",
        "| dropped by the filter | 7 of 1,241 documents |",
        "| contaminated examples of lambada | 12 of 5,153 |",
    ):
        assert row in card, row
    assert "private" not in card and "No audit" not in card and "looked for no overlap" not in card
    other = audit(run.parent / "other", None)
    card = (checkpoint_to_hf(run, run.parent / "hf2", audit=str(other / "manifest.json")) / "README.md").read_text()
    assert "looked for no overlap with evaluation sets" in card


def test_what_is_no_audit_is_refused(run: Path) -> None:
    place = audit(run.parent / "audit", None)
    for text, said in (
        ("{", "not valid JSON"),
        ("{}", "is no audit of tools/audit_corpus.py"),
        ('{"schema": "megameta.audit.manifest/1"}', "is a damaged audit"),
    ):
        (place / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=said):
            checkpoint_to_hf(run, run.parent / "hf", audit=str(place))
    with pytest.raises(UserError, match="cannot read the audit"):
        checkpoint_to_hf(run, run.parent / "hf", audit=str(run.parent / "nowhere"))
    assert not (run.parent / "hf").exists()


def test_weights_alone_say_nothing_of_a_run(run: Path) -> None:
    """A checkpoint without a trainer's state, in the directory of a run that it is no part of."""
    from megameta.checkpoint import load_weights, save_weights

    config, tensors = load_weights(run)
    save_weights(run / "checkpoints" / "converted", config.model, tensors, config.data.tokenizer)
    card = (checkpoint_to_hf(run / "checkpoints" / "converted", run.parent / "hf") / "README.md").read_text()
    assert "## Loss" not in card and "has not been evaluated on held-out text" in card
