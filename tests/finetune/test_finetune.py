"""Fine-tuning on tasks: what a batch holds, whichever the layout; exact resume; accuracy as of greedy decoding."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megameta.checkpoint.save import write_checkpoint
from megameta.checkpoint.store import point_latest
from megameta.config import build_config
from megameta.config.validate import problems
from megameta.data.dataset import IGNORE_INDEX
from megameta.engine.build import DrawnWeights, build_model
from megameta.engine.loss_module import LossModule, sum_scores
from megameta.errors import UserError
from megameta.finetune.data import PhaseOrder, TaskEvaluator, TaskLoader, load_examples
from megameta.finetune.examples import encode_example, read_examples
from megameta.finetune.score import evaluate_tasks, score_cells
from megameta.paper.tasks.generate import TaskOptions, generate
from megameta.paper.tasks.words import WORDS
from megameta.parallel.topology import Topology
from megameta.statistics import wilson
from megameta.tokenizers import load_tokenizer
from megameta.tokenizers.training import train_bpe
from tests.support.commands import run_command

STEPS, MOVE_AT = 8, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("finetune")
    text = " ".join(WORDS) + " 0 1 2 3 4 5 6 7 8 9 Item of Count Bits Parity Text Copy: |"
    train_bpe(iter([text] * 3), 900, found / "tokenizer")
    generate(
        TaskOptions(
            str(found / "tokenizer"),
            str(found / "tasks"),
            tasks=("list_recall", "parity"),
            bins=(64, 128, 256),
            difficulties=("easy", "medium"),
            train=60,
            test=30,
        )
    )
    return found


def settings(folder, name="run", **finetune):
    return {
        "run": {"dir": str(folder / name), "seed": 3},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 900, "meta_token_id": 899},
        "data": {"tokenizer": str(folder / "tokenizer"), "sequence_length": 128, "cache_dir": str(folder / "cache")},
        "train": {"num_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 1},
        "finetune": {"directory": str(folder / "tasks"), "phases": [64, 128], "eval_examples": 9, **finetune},
        "checkpoint": {"interval": 2, "keep": 9},
        "log": {"tensorboard": False},
    }


def config_of(folder, **finetune):
    return build_config(settings(folder, **finetune))


def global_batch(config, order, number, ranks=1, micro=8):
    """All rows of a global batch, in order, read by ranks of their own."""
    raw = config.to_dict()
    raw["train"]["micro_batch_size"] = micro
    by_rank = []
    for rank in range(ranks):
        loader = TaskLoader(order, build_config(raw), Topology(world_size=ranks, rank=rank))
        by_rank.append(loader.read(number))
        loader.close()
    batches = [batch for step in zip(*by_rank) for batch in step]
    ids = [i for batch in batches for i in batch.sample_ids]
    return ids, torch.cat([batch.token_BT for batch in batches]), torch.cat([batch.label_BT for batch in batches])


def test_rows_are_examples_with_loss_on_the_answer(folder):
    """Against the files, read and encoded again, for models with and without markers."""
    for markers in (True, False):
        config = config_of(folder, markers=markers)
        tokenizer = load_tokenizer(config.data.tokenizer)
        known = {}
        for task in ("list_recall", "parity"):
            for example in read_examples(folder / "tasks" / task / "train.jsonl"):
                encoded = encode_example(example, tokenizer, markers=markers)
                known[tuple(encoded.ids.tolist())] = encoded.answer_start
        order = PhaseOrder(config, load_examples(config, "train"))
        for number in range(STEPS):
            _, tokens, labels = global_batch(config, order, number)
            assert ((tokens == 899).sum(dim=1) == int(markers)).all()
            for token_T, label_T in zip(tokens.tolist(), labels.tolist(), strict=True):
                (found,) = [ids for ids in known if list(ids[:-1]) == token_T[: len(ids) - 1] and ids[-1] in label_T]
                answer = known[found]
                assert label_T[answer - 1 : len(found) - 1] == list(found[answer:])
                rest = label_T[: answer - 1] + label_T[len(found) - 1 :]
                assert set(rest) <= {IGNORE_INDEX}
                assert set(token_T[len(found) - 1 :]) <= {tokenizer.eod_id}


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 2), (2, 4), (4, 1)])
def test_the_same_rows_in_any_layout(folder, ranks, micro):
    config = config_of(folder)
    order = PhaseOrder(config, load_examples(config, "train"))
    for number in (0, 3, 4, 7):
        ids, tokens, labels = global_batch(config, order, number)
        other = global_batch(config, order, number, ranks, micro)
        assert ids == other[0] == list(range(8 * number, 8 * number + 8))
        assert torch.equal(tokens, other[1]) and torch.equal(labels, other[2])


def test_phases_and_epochs(folder):
    """A phase's batches hold its bins alone, like lengths, and every example once an epoch, some left over."""
    config = config_of(folder, phases=[64, 128, 256])
    raw = config.to_dict()
    raw["train"]["num_steps"] = 90
    config = build_config(raw)
    examples = load_examples(config, "train")
    order = PhaseOrder(config, examples)
    counts = [sum(int((e.bin_N <= bound).sum()) for e in examples.values()) for bound in (64, 128, 256)]
    assert counts == [len(found) for found in order.members] and counts[2] == 120
    for phase, count in enumerate(counts):
        per_epoch = count // 8
        seen, spread = [], []
        for place in range(2 * per_epoch):
            rows = order.batch(30 * phase + place)
            seen.append([tuple(row) for row in rows.tolist()])
            lengths = [int(order.examples[t].length_N[n]) for t, n in rows]
            spread.append(max(lengths) - min(lengths))
        for epoch in (seen[:per_epoch], seen[per_epoch:]):
            flat = [row for batch in epoch for row in batch]
            assert len(flat) == len(set(flat)) == per_epoch * 8
        assert seen[:per_epoch] != seen[per_epoch:]
        everything = [int(order.examples[t].length_N[n]) for t, n in order.members[phase]]
        assert np.mean(spread) < 0.5 * (max(everything) - min(everything)) or phase == 0


def with_targets(batches):
    """Examples of rows that have targets."""
    return [i for batch in batches for i, row in zip(batch.sample_ids, batch.label_BT) if (row >= 0).any()]


def test_evaluation_counts_each_example_once(folder):
    config = config_of(folder)
    alone = TaskEvaluator(config, Topology())
    assert list(alone.sets) == [f"{task}/{size}" for task in ("list_recall", "parity") for size in (64, 128, 256)]
    for name in alone.sets:
        expected = sorted(with_targets(alone.batches(name)))
        assert len(expected) == len(set(expected)) == 9
        shared, passes = [], set()
        for rank in range(3):
            batches = list(TaskEvaluator(config, Topology(world_size=3, rank=rank)).batches(name))
            passes.add(tuple(batch.token_BT.shape for batch in batches))
            shared += with_targets(batches)
        assert sorted(shared) == expected and len(passes) == 1, "ranks make passes of the same shapes"


def run(folder, name, *overrides, processes=1):
    raw = settings(folder, name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw))
    ranks = ("--nproc-per-node", processes) if processes > 1 else ()
    done = run_command(folder, "megameta", "finetune", path, *overrides, *ranks, check=True)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    evaluations = {record["step"]: record["eval"] for record in records if "eval" in record}
    return losses, evaluations, done.stderr


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, "alone")


def test_a_run_reports_phases_and_accuracy(alone):
    losses, evaluations, said = alone
    assert list(losses) == list(range(1, STEPS + 1)) and list(evaluations) == [4, 8], "at the ends of phases"
    assert set(evaluations[8]) == {f"{task}/{size}" for task in ("list_recall", "parity") for size in (64, 128, 256)}
    assert all(result["examples"] == 9 and 0 <= result["accuracy"] <= 1 for result in evaluations[8].values())
    assert "phase 1: up to 64 tokens" in said and "accuracy" in said


def test_resume_is_exact(folder, alone):
    """From a checkpoint inside a phase, with an epoch's end between."""
    shutil.copytree(folder / "alone", folder / "again")
    point_latest(folder / "again" / "checkpoints" / f"step_{MOVE_AT:08d}")
    losses, evaluations, said = run(folder, "again")
    assert "going on from" in said
    assert losses == alone[0] and evaluations[8] == alone[1][8]


def test_evaluate_says_the_same_as_the_run(folder, alone):
    """In one process, by cells, from the run's checkpoint and from its HuggingFace export."""
    from megameta.finetune.score import evaluate_tasks
    from megameta.hf.convert import checkpoint_to_hf

    checkpoint_to_hf(folder / "alone", folder / "export")
    tasks = f"finetune.directory={folder / 'tasks'}"
    options = [tasks, "finetune.phases=[64,128]", "finetune.eval_examples=9", f"run.dir={folder / 'scored'}"]
    for source, overrides in ((folder / "alone", []), (folder / "export", options)):
        evaluate_tasks(str(source), overrides, json_path=str(folder / "scores.json"))
        cells = json.loads((folder / "scores.json").read_text())["cells"]
        for name, expected in alone[1][8].items():
            task, _, size = name.partition("/")
            here = [cell for cell in cells if (cell["task"], str(cell["bin"])) == (task, size)]
            (whole,) = [cell for cell in here if cell["difficulty"] == "all"]
            assert whole["accuracy"] == expected["accuracy"] and whole["examples"] == 9
            assert whole["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            parts = [cell for cell in here if cell["difficulty"] != "all"]
            assert sum(cell["examples"] for cell in parts) == 9
            right = sum(cell["accuracy"] * cell["examples"] for cell in parts)
            assert right / 9 == pytest.approx(whole["accuracy"])


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    # R: prop.test(x, n, correct=FALSE)$conf.int
    [(0, 10, (0.0, 0.2775328)), (5, 10, (0.2365931, 0.7634069)), (990, 1000, (0.9817, 0.9946)), (0, 0, (0.0, 1.0))],
)
def test_intervals(successes, count, expected):
    assert wilson(successes, count) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    "layout",
    [
        ("train.micro_batch_size=4",),
        ("parallel.tensor_parallel_size=2",),
        ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"),
        ("parallel.pipeline_parallel_size=2",),
        ("parallel.zero_stage=3",),
    ],
)
def test_layouts_agree(folder, alone, layout):
    name = layout[-1].partition("=")[0].replace(".", "_")
    losses, evaluations, _ = run(folder, name, *layout, processes=2)
    assert losses == pytest.approx(alone[0], rel=2e-5)
    for key, result in evaluations[8].items():
        expected = alone[1][8][key]
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert result["examples"] == expected["examples"]
        assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=1 / 9 + 1e-9)


def test_accuracy_is_that_of_greedy_decoding(folder):
    """A model that knows some answers: token by token, without looking at the answer, the same examples are right."""
    config = config_of(folder)
    tokenizer = load_tokenizer(config.data.tokenizer)
    evaluator = TaskEvaluator(config, Topology())
    module = LossModule(build_model(config))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    batches = [batch for name in evaluator.sets for batch in evaluator.batches(name)]
    for _ in range(12):
        for batch in batches[::2]:
            optimizer.zero_grad()
            (module(batch) / batch.num_targets).backward()
            optimizer.step()
    module.eval()
    outcomes = set()
    with torch.no_grad():
        for name, (source, chosen) in evaluator.sets.items():
            total, counts = sum_scores(lambda b: module(b, score=True), evaluator.batches(name), None, "cpu")
            right = 0
            for number in chosen:
                ids, start = source.ids(int(number)).tolist(), int(source.answer_N[number])
                written = ids[:start]
                while len(written) < len(ids) and (len(written) == start or written[-1] != tokenizer.eod_id):
                    logits = module.gpt(torch.tensor([written]))
                    written.append(int(logits[0, -1].argmax()))
                right += written == ids
                outcomes.add(written == ids)
            assert (int(total[2]), counts[2]) == (right, len(chosen))
    assert outcomes == {True, False}, "the test needs a model that is right on some and wrong on others"


def test_bins_beyond_the_window(folder, tmp_path):
    """Scaled by overrides of the evaluation; learned positions end, and such bins are not applicable."""

    def losses(position, *overrides):
        raw = settings(folder)
        # Weights large enough for attention to matter.
        raw["model"] |= {"position": position, "max_position_embeddings": 128, "initializer_range": 0.3}
        config = build_config(raw)
        path = tmp_path / position
        if not path.exists():
            write_checkpoint(path, config, DrawnWeights(config.model, 0))
        evaluate_tasks(str(path), ["finetune.eval_bins=[128, 256]", *overrides], json_path=str(tmp_path / "it.json"))
        cells = json.loads((tmp_path / "it.json").read_text())["cells"]
        return {(c["task"], c["bin"]): c["loss"] for c in cells if c["difficulty"] == "all"}

    plain = losses("rope")
    scaled = losses("rope", "model.position_scaling=yarn", "model.position_scaling_factor=2")
    assert plain.keys() == scaled.keys() == {(t, b) for t in ("list_recall", "parity") for b in (128, 256)}
    assert all(plain[cell] != scaled[cell] for cell in plain)
    assert losses("ape").keys() == {("list_recall", 128), ("parity", 128)}
    with pytest.raises(UserError, match="learned positions end at their window"):
        losses("ape", "model.position_scaling=yarn", "model.position_scaling_factor=2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": [128, 64]}, "ascending"),
        ({"phases": [64, 128, 256]}, "finetune.phases end at 256 tokens, data.sequence_length is 128"),
        ({"phases": [32, 64, 128]}, "does not divide by the 3 phases"),
        ({"markers": False}, "leaves the meta branch nothing to do"),
    ],
)
def test_contradictions(folder, changes, message):
    raw = settings(folder, **changes)
    if message.startswith("finetune.phases end"):
        raw["train"]["num_steps"] = 9
    found = problems(build_config(raw), world_size=1, device="cpu")
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "/nowhere"}, "is not there; megameta tasks generate makes it"),
        ({"tasks": ["copying"]}, "holds no task copying; there: list_recall, parity"),
        ({"phases": [32, 64]}, "examples have up to 32 tokens, fewer than"),
    ],
)
def test_bad_files_are_named(folder, changes, message):
    config = config_of(folder, **changes)
    with pytest.raises(UserError, match=message):
        PhaseOrder(config, load_examples(config, "train"))


def test_tasks_of_other_names(folder, tmp_path):
    """They come after the paper's four, whose order the batches of earlier runs depend on; a difficulty that is not one
    of the paper's is scored with the whole of its bin."""
    shutil.copytree(folder / "tasks", tmp_path / "tasks")
    line = {"task": "capitals", "bin": 64, "prompt": "Item of Count:", "answer": "7"}
    for split in ("train", "test"):
        (tmp_path / "tasks" / "capitals").mkdir(exist_ok=True)
        lines = [json.dumps({**line, "difficulty": level, "answer": level[-1]}) for level in ("easy", "own 1", "own 2")]
        (tmp_path / "tasks" / "capitals" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = config_of(folder, directory=str(tmp_path / "tasks"))
    examples = load_examples(config, "train")
    assert list(examples) == ["list_recall", "parity", "capitals"]
    before = PhaseOrder(config_of(folder), load_examples(config_of(folder), "train")).members[0]
    assert PhaseOrder(config, examples).members[0][: len(before)].tolist() == before.tolist()
    module = LossModule(build_model(config)).eval()
    cells = {(c.bin, c.difficulty): c for c in score_cells(module, config) if c.task == "capitals"}
    assert {key: cell.result.examples for key, cell in cells.items()} == {(64, "all"): 3, (64, "easy"): 1}


def test_columns_before_the_answers_need_no_logits(folder):
    """Loss, gradients and scores are those of all columns."""
    config = config_of(folder)
    module = LossModule(build_model(config)).double()
    batch = TaskLoader(PhaseOrder(config, load_examples(config, "train")), config, Topology()).make_batch(0, 0)
    assert batch.first_target > 0
    assert bool((batch.label_BT[:, : batch.first_target] == IGNORE_INDEX).all())
    assert bool((batch.label_BT[:, batch.first_target] != IGNORE_INDEX).any())
    found = []
    for each in (batch, replace(batch, first_target=0)):
        module.zero_grad()
        loss = module(each)
        loss.backward()
        found.append([loss.detach(), module(each, score=True).detach(), *(p.grad.clone() for p in module.parameters())])
    for ours, all_columns in zip(*found, strict=True):
        torch.testing.assert_close(ours, all_columns, rtol=1e-12, atol=1e-12)
