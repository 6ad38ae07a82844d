"""Reports: numbers stand in the cells that they belong to, and what has not run is left out."""

from pathlib import Path

from megameta.paper.reproduce.report import figure1_parts
from megameta.paper.reproduce.results import DURING, Score, Scores
from megameta.paper.reproduce.runs import Experiment
from megameta.paper.reproduce.scale import load_scale


def cell(arm: str, seed: int, accuracy: float, bound: int = 64, difficulty: str = "all") -> Score:
    return Score(arm, "list_recall", seed, "as trained", bound, 0, 32, accuracy, 1000, difficulty)


def report(scores: list[Score], tmp_path: Path) -> str:
    scale = load_scale("cpu-control", ["tasks.names=[list_recall, copying]", "tasks.bins=[32, 64]"])
    return "\n\n".join(figure1_parts(Scores(scores), Experiment(scale, tmp_path)))


def row(text: str, table: str, name: str) -> list[str]:
    """Cells of a row of the table whose head begins so."""
    part = text.split(f"| {table}")[1].split("\n\n")[0]
    found = [line for line in part.splitlines() if line.startswith(f"| {name}")]
    assert len(found) == 1, (table, name, part)
    return [value.strip() for value in found[0].strip("|").split("|")[1:]]


def test_accuracies_by_difficulty_stand_beside_those_of_all(tmp_path: Path) -> None:
    scores = [cell("meta-rope", seed, 0.5 + seed / 100) for seed in (1, 2, 3)]
    scores += [cell("meta-rope", seed, 0.2 + seed / 100, difficulty="medium") for seed in (1, 2, 3)]
    scores += [cell("meta-rope", seed, 0.8 + seed / 100, difficulty="hard") for seed in (1, 2, 3)]
    scores += [cell("meta-rope", seed, 1.0, bound=32) for seed in (1, 2, 3)]
    scores += [cell("meta-rope", seed, 1.0, bound=32, difficulty="medium") for seed in (1, 2, 3)]
    text = report(scores, tmp_path)
    short, long = row(text, "accuracy at the end", "Meta + RoPE, as trained")
    assert (short, long) == ("100.0 [100.0, 100.0]", "52.0 [49.5, 54.5]")  # 4.303 · 0.01 / √3
    columns = row(text, "by difficulty", "Meta + RoPE, as trained")
    assert [value.split()[0] for value in columns] == ["100.0", "22.0", "82.0"]
    assert "| 32: medium | 64 (not trained): medium | 64 (not trained): hard |" in text


def test_one_difficulty_a_bin_is_not_said_twice(tmp_path: Path) -> None:
    scores = [cell("meta-rope", 1, 0.5, level_bin) for level_bin in (32, 64)]
    scores += [cell("meta-rope", 1, 0.5, level_bin, "medium") for level_bin in (32, 64)]
    assert "by difficulty" not in report(scores, tmp_path)


def test_what_has_not_run_is_left_out(tmp_path: Path) -> None:
    during = Score("meta-rope", "list_recall", 1, DURING, 32, 2400, 32, 0.5, 500)
    text = report([cell("meta-rope", 1, 0.5), cell("meta-rope", 2, 0.6), cell("pause-rope", 1, 0.4), during], tmp_path)
    assert "Copying" not in text and "GPT-2, rotary positions" not in text
    assert "Means over 2 seeds" in text
    # One pair of seeds: an interval over examples, and no claim.
    assert row(text, "differences (points)", "the branch: meta-rope")[1].startswith("+10.0 [")
    assert "one seed, so nothing is claimed" not in text.split("## What that says")[0]
