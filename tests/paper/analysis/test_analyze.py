"""``megameta analyze`` as a person runs it, its report, and what it says where something is missing."""

import base64
import csv
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml

from megameta.__main__ import main
from megameta.errors import UserError
from megameta.hf.convert import checkpoint_to_hf
from megameta.paper.analysis import rate_distortion
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.registry import ANALYSES, Options
from megameta.paper.analysis.report import PAGE, write_report
from megameta.paper.analysis.run import analyze
from megameta.paper.tasks.generate import TaskOptions, generate
from megameta.paper.tasks.words import WORDS
from megameta.tokenizers.training import train_bpe
from tests.support.analyses import subject_of
from tests.support.commands import run_command
from tests.support.training import tiny_values, write_corpus

PNG = b"\x89PNG\r\n\x1a\n"
FEW = Options(num_samples=3)


#: What an export does not say: its text is read without masks, with the default seed.
AS_AN_EXPORT = ["data.document_mask=false", "data.reset_positions=false", "run.seed=1234"]


def external(page: str) -> list[str]:
    """What a page would load or link to outside of itself."""
    found = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)|@import", page)
    return [address for address in found if not address.startswith(("#", "data:image/png;base64,"))]


def check_report(directory, names: set[str] | None = None) -> str:
    """Every figure as PNG, JSON and CSV, and in the page; nothing else."""
    page = (directory / PAGE).read_text(encoding="utf-8")
    assert external(page) == []
    expected = {PAGE}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*.json")]
    for record in records:
        name = record["name"]
        picture = (directory / f"{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert base64.b64encode(picture).decode() in page
        assert f'id="{name}"' in page and f'href="#{name}"' in page
        assert len(record["caption"].split()) > 20 and record["tables"]
        expected |= {f"{name}.png", f"{name}.json"} | {f"{name}-{table}.csv" for table in record["tables"]}
        for table, rows in record["tables"].items():
            with (directory / f"{name}-{table}.csv").open(encoding="utf-8", newline="") as file:
                assert len(list(csv.DictReader(file))) == len(rows) > 0
    assert {path.name for path in directory.iterdir()} == expected
    if names is not None:
        assert {record["name"] for record in records} == names
    return page


@pytest.mark.filterwarnings("error::UserWarning:matplotlib")
def test_a_run(trained, tmp_path, monkeypatch, capsys):
    """The whole report, by the command line; three points of each rate–distortion curve."""
    monkeypatch.setattr(rate_distortion, "BETAS", rate_distortion.BETAS[::3])
    words = ["analyze", "run", "--samples", "4", "--output", str(tmp_path / "out")]
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["megameta", *words])
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "next: open it" in capsys.readouterr().out
    page = check_report(tmp_path / "out")
    assert "megameta analyze run --samples 4" in page and "seed 7 (run.seed)" in page
    assert {"Attention", "Residual stream", "Meta branch"} <= set(re.findall("<h2>(.*?)</h2>", page))


def test_an_export_and_a_figure_by_itself(trained, tmp_path):
    checkpoint_to_hf(str(trained / "run"), str(tmp_path / "export"))
    words = ["entropy", str(tmp_path / "export"), "data.sequence_length=32", "data.meta_token_fraction=0.125"]
    out = tmp_path / "out"
    assert analyze(words, output=str(out), options=FEW, data=[str(trained / "valid")]) == 0
    check_report(out, {"entropy", "entropy-heads"})
    numbers = json.loads((out / "entropy.json").read_text())
    run = tmp_path / "of-run"
    assert analyze(["entropy", str(trained / "run"), *AS_AN_EXPORT], output=str(run), options=FEW) == 0
    for name, rows in json.loads((run / "entropy.json").read_text())["tables"].items():
        for row, other in zip(rows, numbers["tables"][name], strict=True):
            assert row == pytest.approx(other, rel=1e-9)


def fine_tune_tiny(folder: Path) -> Path:
    """Two layers, four steps of copying; the run."""
    text = " ".join(WORDS) + " 0 1 2 3 4 5 6 7 8 9 Text Copy: |"
    train_bpe(iter([text] * 3), 900, folder / "tokenizer")
    sizes = {"tasks": ("copying",), "bins": (64,), "difficulties": ("easy",), "train": 16, "test": 6}
    generate(TaskOptions(str(folder / "tokenizer"), str(folder / "tasks"), **sizes))
    write_corpus(folder / "valid", seed=1)
    values = tiny_values(
        "",
        run__dir=str(folder / "run"),
        model__vocab_size=900,
        model__meta_token_id=899,
        data__tokenizer=str(folder / "tokenizer"),
        data__valid=str(folder / "valid"),
        train__num_steps=4,
        finetune__directory=str(folder / "tasks"),
        data__sequence_length=64,
        model__max_position_embeddings=64,
        finetune__phases=[64],
    )
    del values["data"]["train"]
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run_command(folder, "megameta", "finetune", "run.yaml", check=True)
    return folder / "run"


def test_cache_of_a_fine_tuned_run(tmp_path):
    """On its tasks too; where their directory is gone, the rest with a line about it."""
    run = fine_tune_tiny(tmp_path)
    out = tmp_path / "out"
    assert analyze(["cache", str(run)], output=str(out), options=FEW) == 0
    check_report(out, {"cache-loss", "cache-tasks"})
    record = json.loads((out / "cache-tasks.json").read_text())
    rules = [row["rule"] for row in record["tables"]["accuracy"]]
    assert rules.count("all rows") == 1 and set(rules) == {"all rows", "meta-tokens", "longer window", "random rows"}
    assert record["facts"]["examples"] == {"copying/64": 3}
    (tmp_path / "tasks").rename(tmp_path / "elsewhere")
    assert analyze(["cache", str(run)], output=str(out), options=FEW) == 0
    assert "finetune.directory=DIR says where it is" in check_report(out, {"cache-loss"})


def test_the_same_numbers_again_and_in_place_of_the_report(trained, tmp_path):
    out = tmp_path / "out"
    pages = []
    for _ in range(2):
        analyze(["mass", str(trained / "run")], output=str(out), options=FEW)
        pages.append((out / "mass.json").read_text().partition('"ran"')[0])
    assert pages[0] == pages[1]


def test_without_meta_tokens_figures_are_left_out_and_the_reason_is_said(trained, tmp_path, capsys):
    text = str(trained / "run")
    with pytest.raises(UserError, match="trained without meta-tokens"):
        analyze(["entropy", text, "data.meta_token_fraction=0"], output=str(tmp_path / "out"), options=FEW)
    assert not (tmp_path / "out").exists()
    subject = subject_of(trained)
    plain = dataclasses.replace(subject, form=dataclasses.replace(subject.form, num_meta_tokens=0))
    for name, analysis in ANALYSES.items():
        if analysis.needs in ("meta-tokens", "branch"):
            assert "without meta-tokens" in (analysis.obstacle(plain) or ""), name
            assert analysis.obstacle(subject) is None


def test_every_analysis_can_be_loaded():
    for analysis in ANALYSES.values():
        assert callable(analysis.load()) and analysis.needs in ("nothing", "model", "meta-tokens", "branch")


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], FEW, "give one model"),
        (["entropy"], FEW, "give one model"),
        (["a", "b"], FEW, "give one model.*after at most one of"),
        (["nowhere"], FEW, "nowhere"),
        (["RUN", "data.valid={}"], FEW, "no held-out set is named: give --data"),
        (["RUN"], Options(num_samples=0), "--samples 0"),
        (["RUN"], Options(layers=(7,)), "--layers 7: .* has layers 0 to 2"),
        (["RUN", "data.sequencelength=3"], FEW, "sequence_length"),
    ],
)
def test_mistakes(trained, tmp_path, words, options, message):
    words = [str(trained / "run") if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=message):
        analyze(words, output=str(tmp_path / "out"), options=options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_report_is_not_replaced(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than a report"):
        analyze(["mass", str(trained / "run")], output=str(tmp_path), options=FEW)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def finding(**changes) -> Finding:
    def draw(figure):
        figure.add_subplot().plot([0, 1])

    values = {
        "name": "a",
        "section": "S",
        "title": "T <b>",
        "caption": "C & <script>",
        "draw": draw,
        "tables": {"t": [{"x": 1, "y": math.nan}]},
        "facts": {"f": math.inf},
    }
    return Finding(**(values | changes))


def test_text_is_escaped_and_no_number_is_null(tmp_path):
    write_report(tmp_path / "out", "A", [finding()], {"x": "<i>"}, {"command": "<c>"})
    page = (tmp_path / "out" / PAGE).read_text()
    assert "<script>" not in page and "T &lt;b&gt;" in page and "&lt;i&gt;" in page and "&lt;c&gt;" in page
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["tables"] == {"t": [{"x": 1, "y": None}]} and record["facts"] == {"f": None}
    assert (tmp_path / "out" / "a-t.csv").read_text() == "x,y\n1,\n"


def test_a_report_appears_whole_or_not_at_all(tmp_path):
    def fails(figure):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_report(tmp_path / "out", "A", [finding(), finding(name="b", draw=fails)], {}, {})
    assert list(tmp_path.iterdir()) == []
