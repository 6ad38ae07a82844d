"""Datasets of the tasks: binned by real token counts, disjoint, reproducible, whole or not at all."""

import json
import re

import pytest
import yaml

from megameta.errors import UserError
from megameta.finetune.examples import Example, encode_example, read_examples, render
from megameta.paper.tasks import generate as module
from megameta.paper.tasks.definitions import MARKER, TASKS
from megameta.paper.tasks.generate import TaskOptions, generate
from megameta.paper.tasks.words import WORDS
from megameta.tokenizers import META_TOKEN, load_tokenizer
from megameta.tokenizers.training import train_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(iter([" ".join(WORDS) + " 0 1 2 3 4 5 6 7 8 9 Item of Count Bits Parity Text Copy:"] * 3), 900, folder)
    return folder


def options(tokenizer, folder, **changes):
    settings = {"bins": (64, 128), "train": 60, "test": 40, "seed": 5, **changes}
    return TaskOptions(str(tokenizer), str(folder / "out"), **settings)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder / "out", generate(options(tokenizer, folder))


def test_lengths_and_answers(made, tokenizer):
    """Bins hold what an independent count says, answers what the checker says, both for every example."""
    folder, summaries = made
    loaded = load_tokenizer(tokenizer)
    for summary in summaries:
        assert (summary.train, summary.test) == (60, 40)
        cells = set()
        for split in ("train", "test"):
            for example in read_examples(folder / summary.task / f"{split}.jsonl"):
                text = example.prompt.replace(MARKER, "")
                pieces = example.prompt.split(MARKER)
                count = sum(len(loaded.encode(piece)) for piece in pieces if piece) + len(pieces) - 1
                count += len(loaded.encode(" " + example.answer)) + 1
                plain = len(encode_example(example, loaded, markers=False).ids)
                assert {64: 32, 128: 64}[example.bin] < max(count, plain) <= example.bin
                assert TASKS[example.task].solve(example.prompt) == example.answer
                assert META_TOKEN not in text
                cells.add((example.bin, example.difficulty))
        assert {f"{size} {level}" for size, level in cells} == set(summary.cells)
        assert len(cells) + len(summary.impossible) == 10


def test_no_text_is_in_both_splits(made):
    folder, summaries = made
    for summary in summaries:
        texts = [
            example.prompt.replace(MARKER, "")
            for split in ("train", "test")
            for example in read_examples(folder / summary.task / f"{split}.jsonl")
        ]
        assert len(texts) == len(set(texts)) == 100


def test_duplicates_are_drawn_again(tokenizer, tmp_path, monkeypatch):
    """The first attempt at each example gives the same one: only the second differs."""
    original = module.Generator.numbered
    monkeypatch.setattr(
        module.Generator,
        "numbered",
        lambda self, split, n, attempt: original(self, split, n if attempt else 0, attempt),
    )
    (summary,) = generate(options(tokenizer, tmp_path, tasks=["parity"], train=8, test=8))
    assert summary.redrawn == 14  # all but the first of either split
    prompts = [
        example.prompt
        for split in ("train", "test")
        for example in read_examples(tmp_path / f"out/parity/{split}.jsonl")
    ]
    assert len(set(prompts)) == 16


def test_the_same_seed_gives_the_same_bytes(made, tokenizer, tmp_path):
    again = generate(options(tokenizer, tmp_path))
    assert [summary.sha256 for summary in again] == [summary.sha256 for summary in made[1]]
    for file in made[0].rglob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(made[0])).read_bytes()
    other = generate(options(tokenizer, tmp_path, seed=6, overwrite=True))
    assert all(a.sha256["test"] != b.sha256["test"] for a, b in zip(again, other, strict=True))


def test_the_test_split_does_not_depend_on_the_training_split(made, tokenizer, tmp_path):
    fewer = generate(options(tokenizer, tmp_path, train=5))
    assert [summary.sha256["test"] for summary in fewer] == [summary.sha256["test"] for summary in made[1]]


def test_datasets_reads_the_directory(made, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(made[0]), "copying", cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 60, "test": 40}
    assert set(loaded["test"].column_names) == {"task", "difficulty", "bin", "prompt", "answer"}


def test_harness_files_say_the_same_prompts(made):
    """What lm-eval's template makes of a document is what our own models are given."""
    import jinja2

    for task in TASKS:
        for suffix, markers in (("", True), ("_plain", False)):
            content = yaml.safe_load((made[0] / f"lm_eval/megameta_{task}{suffix}.yaml").read_text())
            example = next(read_examples(made[0] / task / "test.jsonl"))
            template = jinja2.Template(content["doc_to_text"])
            assert template.render(prompt=example.prompt) == render(example, markers=markers)
            assert content["dataset_kwargs"]["data_files"]["test"] == str(made[0] / task / "test.jsonl")


def test_rendering():
    recall = Example("list_recall", "easy", 64, "A: x y _PAUSE_\nB: z w\nItem 2 of A:", "y")
    assert render(recall, markers=True) == "A: x y<|meta|>\nB: z w\nItem 2 of A:"
    assert render(recall, markers=False) == "A: x y\nB: z w\nItem 2 of A:"
    parity = Example("parity", "easy", 64, "Bits: 1 0 _PAUSE_ 1\nParity:", "1")
    assert render(parity, markers=True) == "Bits: 1 0<|meta|> 1\nParity:"
    assert render(parity, markers=False) == "Bits: 1 0 | 1\nParity:"


def test_ids(tokenizer):
    """The marker is one meta-token and changes no other id; the answer with its end is at the end."""
    loaded = load_tokenizer(tokenizer)
    example = Example("list_recall", "easy", 64, "Tools: hammer saw _PAUSE_\nFruits: fig\nItem 2 of Tools:", "saw")
    marked, plain = (encode_example(example, loaded, markers=markers) for markers in (True, False))
    ids = marked.ids.tolist()
    assert ids.count(loaded.meta_token_id) == 1
    assert [i for i in ids if i != loaded.meta_token_id] == plain.ids.tolist()
    assert loaded.decode(marked.ids[marked.answer_start : -1]) == " saw" and ids[-1] == loaded.eod_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["sorting"]}, "unknown task sorting; there are list_recall"),
        ({"difficulties": ["easier"]}, "unknown difficulty easier"),
        ({"bins": (128, 64)}, "ascending"),
        ({"train": 0, "test": 0}, "not both 0"),
        ({"tasks": ["copying"], "bins": (64,), "difficulties": ["long"]}, "no difficulty fits"),
    ],
)
def test_refusals_leave_nothing(tokenizer, tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate(options(tokenizer, tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(made, tokenizer):
    with pytest.raises(UserError, match="already there"):
        generate(options(tokenizer, made[0].parent))


@pytest.mark.parametrize("line", ["no json", "[1]", "{}", json.dumps({"task": "x", "prompt": ""})])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: not an example"):
        list(read_examples(tmp_path / "a.jsonl"))


def test_a_difficulty_that_barely_fits_a_bin(tokenizer, tmp_path, monkeypatch):
    """Lengths are drawn until one has an example, in place of an error deep into a long job."""
    generator = module.Generator(options(tokenizer, tmp_path), "copying", load_tokenizer(tokenizer))
    made, tries = generator.example, []

    def rarely(draws, low, high, difficulty):
        tries.append(draws)
        return made(draws, low, high, difficulty) if len(tries) > 60 else None

    monkeypatch.setattr(generator, "example", rarely)
    assert generator.numbered("train", 0, 0).task == "copying" and len(tries) == 61
