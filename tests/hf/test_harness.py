"""lm-eval on exports: its own ``hf`` model gives the plain numbers, ours the same and those of every policy."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megameta.errors import UserError
from megameta.hf.export import export_to_hf
from megameta.hf.insertion import MetaPolicy
from megameta.hf.load import load_causal_lm
from megameta.model import GPT
from tests.support.exports import small_tokenizer, tokenizer_config
from tests.support.models import small_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megameta[eval]'")

PAIRS = [
    ("the old man", " and the sea"),
    ("the sea", ", the old"),
    ("hammer<|meta|> pliers\nwrench", " sea\nold"),
    ("", "the old man and the sea and the hammer"),
    ("man and sea" * 30, " and the old man"),  # longer than the window
]
ROLLING = ["the old man and the sea\nhammer the pliers\n" * 6, "sea"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer, max_position_embeddings=32)
    model = small_model(config, torch.float32, vocab_multiple=1, seed=3).eval()
    directory = tmp_path_factory.mktemp("export") / "hf"
    export_to_hf(config, {name: p.detach() for name, p in model.named_parameters()}, directory, tokenizer=tokenizer)
    return directory, model.double()


def requests(kind: str) -> list[Any]:
    if kind == "rolling":
        return [SimpleNamespace(args=(text,)) for text in ROLLING]
    return [SimpleNamespace(args=pair) for pair in PAIRS]


def ours(directory: Path, policy: MetaPolicy, batch_size: int) -> Any:
    from megameta.hf.harness import HarnessModel
    from megameta.tokenizers import load_tokenizer

    return HarnessModel(load_causal_lm(directory), load_tokenizer(directory), policy, batch_size=batch_size)


def stock(directory: Path, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def scores(model: Any) -> list[float]:
    found = [score for score, _ in model.loglikelihood(requests("pairs"), disable_tqdm=True)]
    return found + model.loglikelihood_rolling(requests("rolling"), disable_tqdm=True)


def policies(model: GPT) -> dict[str, MetaPolicy]:
    meta = model.config.meta_token_id
    newline = small_tokenizer().encode("\n")
    assert len(newline) == 1
    return {
        "none": MetaPolicy("none", meta),
        "given": MetaPolicy("given", meta),
        "every": MetaPolicy("every", meta, 4),
        "segments": MetaPolicy("segments", meta, segment_ends=frozenset(newline)),
    }


def log_probability(model: GPT, ids: list[int], start: int, limit: int) -> float:
    """Target by target, float64, one sequence: the sequence cut on the left to ``limit`` slots and its last target."""
    meta, cut = model.config.meta_token_id, max(0, len(ids) - limit - 1)
    total = 0.0
    with torch.no_grad():
        log_TV = model(torch.tensor([ids[cut:-1]])).log_softmax(dim=-1)[0]
    for place in range(max(start, cut + 1), len(ids)):
        if ids[place] != meta:
            total += float(log_TV[place - cut - 1, ids[place]])
    return total


@pytest.mark.parametrize("name", ["none", "given", "every", "segments"])
def test_log_likelihoods_of_every_policy(name: str, export: tuple[Path, GPT]) -> None:
    directory, model = export
    chosen, tokenizer = policies(model)[name], small_tokenizer()
    found = [s for s, _ in ours(directory, chosen, 8).loglikelihood(requests("pairs"), disable_tqdm=True)]
    for score, (context, continuation) in zip(found, PAIRS, strict=True):
        before = tokenizer.encode_prompt(context) or [tokenizer.eod_id]
        whole = chosen.apply([*before, *tokenizer.encode_prompt(continuation)])
        while whole[-1] == chosen.meta_token_id:
            whole.pop()
        expected = log_probability(model, whole, len(chosen.apply(before)), 32)
        assert score == pytest.approx(expected, rel=1e-5), context


@pytest.mark.parametrize("name", ["none", "given", "every", "segments"])
def test_scores_do_not_depend_on_the_batch(name: str, export: tuple[Path, GPT]) -> None:
    directory, model = export
    chosen = policies(model)[name]
    alone, together = (scores(ours(directory, chosen, size)) for size in (1, 4))
    assert alone == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("name", ["every", "segments"])
def test_rolling_windows_score_every_text_token_once(name: str, export: tuple[Path, GPT]) -> None:
    """With uniform predictions each text token costs ln V, whatever windows and meta-tokens there are."""
    directory, model = export
    uniform = ours(directory, policies(model)[name], 4)
    for parameter in uniform.model.parameters():
        parameter.data.zero_()
    tokenizer = small_tokenizer()
    found = uniform.loglikelihood_rolling(requests("rolling"), disable_tqdm=True)
    per_token = torch.log(torch.tensor(float(model.config.vocab_size)))
    expected = [-float(per_token) * len(tokenizer.encode(text)) for text in ROLLING]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_harness_own_model_gives_the_same_numbers(export: tuple[Path, GPT]) -> None:
    directory, model = export
    expected = scores(ours(directory, policies(model)["given"], 4))
    assert scores(stock(directory, 1)) == pytest.approx(expected, rel=1e-5)
    assert scores(stock(directory, 4)) == pytest.approx(expected, rel=1e-5)


def write_task(directory: Path) -> None:
    lines = [{"question": "the old", "choices": [" man", " sea"], "answer": 0}] * 3
    (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / "data.jsonl")}}}
    task = {
        "task": "local_choice",
        **data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    written = {
        "task": "local_text",
        **data,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " man",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for values in (task, written):
        (directory / f"{values['task']}.yaml").write_text(yaml.safe_dump(values))


def test_the_command(
    export: tuple[Path, GPT], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    from megameta.hf.lm_eval import evaluate_harness

    monkeypatch.setattr(tasks, "TaskManager", cache(tasks.TaskManager))  # it reads 12,000 files
    directory, _ = export
    write_task(tmp_path)
    options: dict[str, Any] = {"include_path": str(tmp_path), "json_path": str(tmp_path / "found.json")}
    assert evaluate_harness(str(directory), ["local_choice", "local_text"], policy="every", every=3, **options) == 0
    record = json.loads((tmp_path / "found.json").read_text())
    assert {row["task"] for row in record["results"]} == {"local_choice", "local_text"}
    assert {row["examples"] for row in record["results"]} == {3} and record["every"] == 3
    assert "every 3th slot" in capsys.readouterr().out
    with pytest.raises(UserError, match="no task local_nothing"):
        evaluate_harness(str(directory), ["local_nothing"], **options)
    with pytest.raises(UserError, match="not a HuggingFace export"):
        evaluate_harness(str(tmp_path), ["local_choice"], **options)


@pytest.mark.slow
def test_lm_eval_itself_on_an_export(export: tuple[Path, GPT], tmp_path: Path) -> None:
    """The command line of lm-eval, as its users type it."""
    write_task(tmp_path)
    arguments = ["--model", "hf", "--model_args", f"pretrained={export[0]},trust_remote_code=True", "--device", "cpu"]
    arguments += ["--include_path", str(tmp_path), "--tasks", "local_choice,local_text", "--batch_size", "2"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local_choice" in done.stdout and "exact_match" in done.stdout
