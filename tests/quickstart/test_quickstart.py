"""The quickstart's corpus, its checks, its report, its stages; and the whole line in miniature."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megameta.checkpoint import save_weights
from megameta.config import RunConfig, build_config
from megameta.errors import UserError
from megameta.model import GPT, ModelConfig, initialize_weights
from megameta.quickstart import claims, corpus
from megameta.quickstart.report import ModelResult, Results, plot_losses, render_report, smooth, table
from megameta.quickstart.stages import Commands, Stage, StageRunner, StageTime, Stopped
from tests.support.paths import ROOT

# --- corpus -----------------------------------------------------------------------------------------------------------


def make_sources(root: Path) -> None:
    files = {
        "b.py": "B = 'é'\n",
        "a.py": "# -*- coding: latin-1 -*-\nA = 'é'\n",
        "pkg/__init__.py": "",
        "pkg/inner.py": "INNER = 1\n",
        "test/test_a.py": "SKIPPED = 1\n",
        "pkg/tests/x.py": "SKIPPED = 1\n",
        "site-packages/other.py": "SKIPPED = 1\n",
        "pydoc_data/topics.py": "SKIPPED = 1\n",
        "notes.txt": "not a source",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1" if "latin-1" in text else "utf-8"))
    (root / "broken.py").write_bytes(b"x = '\xff'\n")


def test_sources_are_the_librarys_own_in_order(tmp_path: Path) -> None:
    make_sources(tmp_path)
    documents = {document.name: document.text for document in corpus.source_documents(tmp_path)}
    assert list(documents) == ["source/a.py", "source/b.py", "source/pkg/inner.py"]
    assert documents["source/a.py"].endswith("A = 'é'\n")


def test_only_some_of_the_codecs_tables_are_kept(tmp_path: Path) -> None:
    (tmp_path / "encodings").mkdir()
    for number in range(60):
        (tmp_path / "encodings" / f"cp{number}.py").write_text("codecs.charmap_decode(table)\n")
    (tmp_path / "encodings" / "utf_8.py").write_text("decode = codecs.utf_8_decode\n")
    names = [document.name for document in corpus.source_documents(tmp_path)]
    assert "source/encodings/utf_8.py" in names and 10 < len(names) < 31


def test_docstrings_hold_functions_and_methods_and_no_addresses() -> None:
    documents = {document.name: document.text for document in corpus.docstring_documents()}
    text = documents["docstrings/builtins"]
    assert "builtins.len\n\nReturn the number of items in a container." in text
    assert "str.split\n\n" in text
    assert " at 0x" not in "".join(documents.values())


def test_topics_are_documents() -> None:
    documents = {document.name: document.text for document in corpus.topic_documents()}
    assert "topic/lambda" in documents and len(documents) > 50


def test_split_is_a_function_of_the_name_and_about_five_percent() -> None:
    held_out = [corpus.is_held_out(f"source/{number}.py") for number in range(20_000)]
    assert 0.045 < np.mean(held_out) < 0.055
    # Golden: the split may not change between versions or machines.
    assert [n for n in range(100) if held_out[n]] == GOLDEN_HELD_OUT


GOLDEN_HELD_OUT = [33, 45, 80]


def test_corpus_is_split_whole_and_repeatable(tmp_path: Path) -> None:
    documents = [corpus.Document(f"source/{number}.py", f"text {number} é\n") for number in range(200)]
    size = corpus.write_corpus(tmp_path, iter(documents))
    first = {split: (tmp_path / f"{split}.jsonl").read_bytes() for split in ("train", "valid")}
    corpus.write_corpus(tmp_path, iter(documents))
    assert first == {split: (tmp_path / f"{split}.jsonl").read_bytes() for split in ("train", "valid")}
    lines = {split: [json.loads(line) for line in content.splitlines()] for split, content in first.items()}
    assert {split: len(content) for split, content in lines.items()} == size.documents
    assert sum(size.bytes.values()) == sum(len(document.text.encode()) for document in documents)
    assert all(corpus.is_held_out(line["name"]) for line in lines["valid"])
    assert not any(corpus.is_held_out(line["name"]) for line in lines["train"])


def test_corpus_stops_at_its_limit_and_refuses_an_empty_split(tmp_path: Path) -> None:
    documents = [corpus.Document(f"source/{number}.py", "x" * 100) for number in range(2000)]
    size = corpus.write_corpus(tmp_path, iter(documents), max_bytes=20_000)
    assert 20_000 <= size.bytes["train"] < 21_000
    with pytest.raises(UserError, match="no train documents"):
        corpus.write_corpus(tmp_path, iter([]))


# --- checks -----------------------------------------------------------------------------------------------------------


def test_unigram_entropy() -> None:
    assert claims.unigram_entropy(np.array([7, 7, 7])) == 0
    assert claims.unigram_entropy(np.arange(8)) == pytest.approx(math.log(8))
    assert claims.unigram_entropy(np.array([0, 0, 0, 5])) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_loss_claims_ask_for_the_margin_and_for_finite_losses() -> None:
    made = claims.loss_claims({"a": 4.9, "b": 5.1, "c": math.nan, "d": -math.inf}, entropy=6.0, margin=1.0)
    assert [claim.holds for claim in made] == [True, False, False, False]
    assert "4.900" in made[0].text and "6.000" in made[0].text


def test_same_targets_claim() -> None:
    assert claims.same_targets_claim([5, 5, 5]).holds
    assert not claims.same_targets_claim([5, 6]).holds


def test_branch_movement_is_measured_from_the_drawn_weights(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2)
    model = GPT(config)
    seed = build_config({}).run.seed
    initialize_weights(model, config, seed)
    weights = {name: tensor.detach()[:64].clone() for name, tensor in model.named_parameters()}
    save_weights(tmp_path / "initial", config, weights, None)
    still = claims.branch_movement(tmp_path / "initial")
    assert len(still) == 2 and set(still.values()) == {0.0}
    assert not claims.branch_claim(still).holds
    names = list(still)
    weights[names[0]] *= 1.5
    save_weights(tmp_path / "half", config, weights, None)
    half = claims.branch_movement(tmp_path / "half")
    assert half[names[0]] == pytest.approx(0.5) and half[names[1]] == 0.0
    assert not claims.branch_claim(half).holds  # every layer must move
    weights[names[1]] += 0.1
    save_weights(tmp_path / "moved", config, weights, None)
    assert claims.branch_claim(claims.branch_movement(tmp_path / "moved")).holds
    assert not claims.branch_claim({}).holds
    assert torch.isfinite(weights[names[1]]).all()


def test_final_evaluation_is_that_of_the_last_step(tmp_path: Path) -> None:
    records = [{"step": 1, "eval": {"valid": {"loss": 3.0}}}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert claims.final_evaluation(tmp_path, 1) == {"valid": {"loss": 3.0}}
    with pytest.raises(UserError, match="no evaluation of step 2"):
        claims.final_evaluation(tmp_path, 2)


# --- report -----------------------------------------------------------------------------------------------------------


def make_results(output: Path) -> Results:
    def result(title: str, config: RunConfig, shift: float) -> ModelResult:
        records: list[dict] = [
            {"step": step, "loss": 8 - step / 10 + shift, "targets": 100, "tokens_per_second": 1000.0}
            for step in range(1, 21)
        ]
        evaluation = {"valid": {"loss": 6.5 + shift, "perplexity": 665.1, "bits_per_byte": None, "targets": 4321}}
        if config.data.num_meta_tokens:
            evaluation["valid/no-meta"] = {**evaluation["valid"], "bits_per_byte": 2.25}
        records.append({"step": 20, "eval": evaluation})
        samples = [{"prompt": "a", "kind": "greedy", "text": "a | b\n# c"}]
        return ModelResult(title, config, records, evaluation, "x.MegametaForCausalLM", samples)

    models = {
        "meta": result("with", build_config({"data": {"sequence_length": 20}}), 0.0),
        "twin": result("without", build_config({"data": {"sequence_length": 18, "meta_token_fraction": 0}}), 0.25),
    }
    made = [claims.Claim("first", True), claims.Claim("second", False)]
    times = [StageTime("one", 61.0), StageTime("two", 5.4)]
    return Results({"Python": "3.11"}, models, 7.0, made, times, ["python tools/quickstart.py"], output)


def test_report_says_everything(tmp_path: Path) -> None:
    text = render_report(make_results(tmp_path))
    for expected in (
        "**1 of 2 claims do not hold.**",
        "- holds: first",
        "- **does not hold**: second",
        "| with, meta-tokens injected | 6.5000 | 665.1 |  | 0.500 | 4,321 |",
        "| with, read without meta-tokens | 6.5000 | 665.1 | 2.2500 | 0.500 | 4,321 |",
        "| without | 6.7500 |",
        "| unigram entropy of the targets | 7.0000 |",
        "| one | 1:01 |",
        "| together | 1:06 |",
        "18 + 2",
        "    a | b\n    # c",
        "python tools/quickstart.py",
        "(loss.png)",
    ):
        assert expected in text, expected


def test_curves_are_written_whole(tmp_path: Path) -> None:
    plot_losses(make_results(tmp_path), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_smoothing_knows_nothing_of_later_points() -> None:
    assert smooth(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]
    assert smooth(np.array([1.0, 2.0]), 1).tolist() == [1.0, 2.0]


def test_table_escapes_bars() -> None:
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


# --- stages -----------------------------------------------------------------------------------------------------------


def run_stage(directory: Path, inputs: object, log: list[str], *, fail: bool = False) -> None:
    output = directory / "out.txt"

    def work() -> None:
        log.append("went on" if output.exists() else "began")
        output.write_text("made")
        if fail:
            raise UserError("broke off")

    StageRunner(directory, 1).run(Stage("work", "some work", work, inputs, (output,)))


def test_finished_stage_is_skipped_until_its_inputs_or_outputs_change(tmp_path: Path) -> None:
    log: list[str] = []
    run_stage(tmp_path, 1, log)
    run_stage(tmp_path, 1, log)
    assert log == ["began"]
    run_stage(tmp_path, 2, log)
    assert log == ["began", "began"]
    (tmp_path / "out.txt").unlink()
    run_stage(tmp_path, 2, log)
    assert log == ["began", "began", "began"]


def test_interrupted_stage_goes_on_with_what_it_left(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(UserError):
        run_stage(tmp_path, 1, log, fail=True)
    run_stage(tmp_path, 1, log)
    assert log == ["began", "went on"]
    with pytest.raises(UserError):
        run_stage(tmp_path, 3, log, fail=True)
    run_stage(tmp_path, 4, log)  # other inputs: what the failed stage left is not used
    assert log == ["began", "went on", "began", "began"]


def test_later_stage_depends_on_earlier_inputs(tmp_path: Path) -> None:
    log: list[str] = []
    for inputs in (1, 1, 2):
        runner = StageRunner(tmp_path, 2)
        runner.run(Stage("first", "first", lambda: log.append("first"), inputs, ()))
        runner.run(Stage("second", "second", lambda: log.append("second"), "same", ()))
    assert log == ["first", "second", "first", "second"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setattr("megameta.quickstart.stages.STOP_SIGNALS", ())
    return Commands({"MEGAMETA_TEST": "set"})


def test_commands_are_shown_and_their_failure_is_named(commands: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    commands.python("-c", "import os; print(os.environ['MEGAMETA_TEST'])")
    assert capfd.readouterr().out == "$ python -c 'import os; print(os.environ['\"'\"'MEGAMETA_TEST'\"'\"'])'\nset\n"
    with pytest.raises(UserError, match="exit code 3"):
        commands.python("-c", "raise SystemExit(3)")
    with pytest.raises(Stopped):
        commands.python("-c", "raise SystemExit(75)")


def test_export_is_opened_only_where_the_package_is_blocked(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; m = runpy.run_path(sys.argv[1]); print(m['block_megameta']())\n"
        "try:\n    import megameta.model\nexcept ModuleNotFoundError as error:\n    print('and', error)"
    )
    script = ROOT / "megameta" / "quickstart" / "open_export.py"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "ModuleNotFoundError: No module named 'megameta' (blocked)",
        "and No module named 'megameta' (blocked)",
    ]
