"""Configurations of the runs of an experiment, and the jobs that do them.

Under OUTPUT: corpus/, tokenizer/, data/, tasks/; configs/ holds a configuration of each run, for ``megameta train`` and
``megameta finetune``; runs/ the runs; scores/ what ``megameta tasks evaluate`` and ``megameta evaluate`` found.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megameta.config import RunConfig, build_config
from megameta.model.flops import forward_flops
from megameta.paper.reproduce.arms import ARMS, Arm
from megameta.paper.reproduce.jobs import Job
from megameta.paper.reproduce.scale import Scale, TasksPart

#: How a fine-tuned model is evaluated: overrides of its configuration, by name.
CONDITIONS: dict[str, tuple[str, ...]] = {
    "as trained": (),
    "positions zeroed": ("model.zero_meta_positions=true",),
    "embedding zeroed": ("model.zero_meta_embedding=true",),
}
#: Markers of an example at most, and so meta-tokens.
_MARKERS = 2


@dataclass(frozen=True)
class Cell:
    """One fine-tuned model."""

    arm: Arm
    task: str
    seed: int

    @property
    def names(self) -> tuple[str, str, str]:
        """Parts of its paths."""
        return (self.arm.name, self.task, str(self.seed))

    @property
    def finetune_name(self) -> str:
        """Of the job that trains it."""
        return "/".join(("finetune", *self.names))

    def evaluate_name(self, condition: str) -> str:
        """Of the job that evaluates it."""
        return "/".join(("evaluate", *self.names, condition.replace(" ", "-")))


class Experiment:
    """Runs of a scale under one directory.

    Args:
        done: names of the jobs that are done, where a report is wanted of those alone; None: all are.
    """

    def __init__(self, scale: Scale, output: Path, done: frozenset[str] | None = None) -> None:
        self.scale, self.output, self.done = scale, output, done

    def has(self, job: str) -> bool:
        """Whether a report may read what the job left."""
        return self.done is None or job in self.done

    # --- places -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Path:
        given = self.scale.corpus.tokenizer
        return self.output / "tokenizer" if given is None else Path(given)

    def run_dir(self, *names: object) -> Path:
        return self.output.joinpath("runs", *map(str, names))

    def scores(self, *names: object) -> Path:
        return self.output.joinpath("scores", *(str(name).replace(" ", "-") for name in names)).with_suffix(".json")

    # --- configurations ---------------------------------------------------------------------------------------------

    def pretraining(self, arm: Arm, seed: int) -> dict[str, Any]:
        """From nothing, on the corpus."""
        common = self.pretraining_keys(arm)
        run = {"dir": str(self.run_dir("pretrain", arm.name, seed)), "seed": seed}
        raw = merge(common, {"run": run, "data": self.text_keys(arm, common["data"])})
        if arm.position == "ape":
            raw["model"]["max_position_embeddings"] = self._window()
        return self._with_equal_compute(raw, arm, lambda other: self.pretraining(other, seed))

    def finetuning(self, arm: Arm, task: str, seed: int) -> dict[str, Any]:
        """Phases of one task, from the pre-trained weights of the same seed."""
        scale = self.scale
        raw = merge(
            self.finetuning_keys(arm),
            {"data": {"tokenizer": str(self.tokenizer), "sequence_length": scale.phases[-1]}},
            {
                "run": {"dir": str(self.run_dir("finetune", arm.name, task, seed)), "seed": seed},
                "finetune": {
                    "directory": str(self.output / "tasks"),
                    "tasks": [task],
                    "phases": scale.phases,
                    "markers": arm.meta_tokens,
                    "eval_bins": scale.tasks.bins,
                },
            },
        )
        raw = whole_phases(raw)
        if scale.pretrain:
            raw["init"] = {"from_checkpoint": str(self.run_dir("pretrain", arm.name, seed))}
        if arm.position == "ape":
            raw["model"]["max_position_embeddings"] = self._window()
        return self._with_equal_compute(raw, arm, lambda other: self.finetuning(other, task, seed))

    def pretraining_keys(self, arm: Arm) -> dict[str, Any]:
        """What an arm's pre-trainings share."""
        return merge(self._common(arm), self.scale.pretrain)

    def finetuning_keys(self, arm: Arm) -> dict[str, Any]:
        """What an arm's fine-tunings share."""
        return merge(self._common(arm), self.scale.finetune)

    def _common(self, arm: Arm) -> dict[str, Any]:
        logged = {"log": {"tensorboard": False, "interval": 50}, "checkpoint": {"keep": 1}}
        shared = {"data": {"cache_dir": str(self.output / "cache")}}
        return merge(logged, shared, {"model": self.scale.model}, {"model": arm.model()})

    def _window(self) -> int:
        """Rows of the table of learned positions: nothing longer is read."""
        pretrained = self.scale.pretrain.get("data", {}).get("sequence_length", 0)
        return max(self.scale.phases[-1], pretrained)

    def text_keys(self, arm: Arm, data: Mapping[str, Any]) -> dict[str, Any]:
        """A data section with the corpus in it. Of a twin for quality: without meta-tokens a sequence holds the same
        text and nothing else (spec §4)."""
        found = {**data, "tokenizer": str(self.tokenizer), **self._corpus_keys()}
        if not arm.meta_tokens:
            text = build_config({"data": data}, "pretrain").data.text_per_sample
            found |= {"sequence_length": text, "meta_token_fraction": 0.0}
        return found

    def _corpus_keys(self) -> dict[str, Any]:
        """Where the tokenised corpus is."""
        data = self.output / "data"
        if self.scale.corpus.inputs and not self.scale.corpus.heldout_inputs:
            held = self.scale.corpus.heldout_percent
            return {"train": [str(data / "train_text_document")], "split": [100 - held, held, 0]}
        return {split: [str(data / f"{split}_text_document")] for split in ("train", "valid")}

    def _with_equal_compute(self, raw: dict[str, Any], arm: Arm, of: Any) -> dict[str, Any]:
        """As many more steps as make up for the flops of a step."""
        if arm.equal_compute is None:
            return raw
        other = of(ARMS[arm.equal_compute])
        steps = round(step_count(raw) * training_flops(other, 1) / training_flops(raw, 1))
        raw["train"]["num_steps"] = steps
        return whole_phases(raw)

    # --- jobs -------------------------------------------------------------------------------------------------------

    def data_job(self) -> Job:
        """Corpus, tokenizer, tokenised corpus: whatever the scale does not bring."""
        settings = self.output / "configs" / "corpus.yaml"
        corpus = self.scale.corpus.model_dump(mode="json", exclude_none=True) | {"output": str(self.output)}
        self.write(settings, corpus)
        outputs = [self.output / "data"]
        if self.scale.corpus.tokenizer is None:
            outputs.append(self.output / "tokenizer")
        command = ("-m", "megameta.paper.reproduce.prepare", str(settings))
        return Job("data", (command,), tuple(outputs), inputs=corpus, weight=1e12)

    def tasks_job(self, tasks: TasksPart | None = None, name: str = "tasks") -> Job:
        """Examples of the tasks; ``name``: of the job and of the directory."""
        tasks = tasks or self.scale.tasks
        output = self.output / name
        command = ["-m", "megameta", "tasks", "generate", "--tokenizer", str(self.tokenizer), "--output", str(output)]
        command += ["--tasks", *tasks.names, "--bins", *map(str, tasks.bins), "--difficulties", *tasks.difficulties]
        command += ["--train", str(tasks.train), "--test", str(tasks.test), "--overwrite"]
        return Job(name, (tuple(command),), (output,), ("data",), weight=1e12)

    def pretrain_job(self, arm: Arm, seed: int) -> Job:
        raw = self.pretraining(arm, seed)
        return self.run_job("train", ("pretrain", arm.name, str(seed)), raw, ("data",))

    def finetune_job(self, cell: Cell) -> Job:
        raw = self.finetuning(cell.arm, cell.task, cell.seed)
        needs = ["tasks"]
        if self.scale.pretrain:
            needs.append(f"pretrain/{cell.arm.name}/{cell.seed}")
        return self.run_job("finetune", ("finetune", *cell.names), raw, tuple(needs))

    def run_job(self, command: str, names: tuple[str, ...], raw: dict[str, Any], needs: tuple[str, ...]) -> Job:
        """``megameta COMMAND`` on a configuration that is written down for it."""
        path = self.output.joinpath("configs", *names).with_suffix(".yaml")
        self.write(path, raw)
        arguments = ["-m", "megameta", command, str(path)]
        if self.scale.processes > 1:
            arguments += ["--nproc-per-node", str(self.scale.processes)]
        weight = training_flops(raw, step_count(raw))
        return Job("/".join(names), (tuple(arguments),), (Path(raw["run"]["dir"]),), needs, weight, raw)

    def evaluate_job(self, cell: Cell, condition: str, bins: list[int]) -> Job:
        """Accuracy of a fine-tuned model on the test examples, by bin."""
        overrides = CONDITIONS.get(condition) or self._extension(condition)
        return self.score_job(
            cell.evaluate_name(condition),
            cell.finetune_name,
            self.finetuning(cell.arm, cell.task, cell.seed),
            self.scores("tasks", *cell.names, condition),
            bins,
            overrides,
        )

    def score_job(
        self, name: str, before: str, raw: dict[str, Any], path: Path, bins: list[int], overrides: tuple[str, ...] = ()
    ) -> Job:
        """``megameta tasks evaluate`` of the fine-tuning ``raw``, which the job ``before`` runs, to ``path``."""
        count = self.scale.test_examples
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [f"finetune.eval_bins={bins}", f"finetune.eval_examples={count}", *overrides, "--json", str(path)]
        command = ("-m", "megameta", "tasks", "evaluate", raw["run"]["dir"], *found)
        weight = sum(count * sequence_flops(raw, bound) for bound in bins)
        return Job(name, (command,), (path,), (before,), weight)

    def _extension(self, condition: str) -> tuple[str, ...]:
        """Overrides of "yarn 2": positions scaled by YaRN without further training."""
        if not condition.startswith("yarn "):
            return ()
        return (
            "model.position_scaling=yarn",
            f"model.position_scaling_factor={condition.split()[1]}",
            f"model.original_max_position_embeddings={self.scale.phases[-1]}",
        )

    def perplexity_job(self, arm: Arm, seed: int) -> Job:
        """Held-out loss of a pre-trained model, text positions alone."""
        path = self.scores("ppl", arm.name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        source = str(self.run_dir("pretrain", arm.name, seed))
        options = ("eval.num_samples=0", "--by-position", "8", "--json", str(path))
        command = ("-m", "megameta", "evaluate", source, *options)
        return Job(f"ppl/{arm.name}/{seed}", (command,), (path,), (f"pretrain/{arm.name}/{seed}",), weight=1e12)

    @staticmethod
    def write(path: Path, raw: Mapping[str, Any]) -> None:
        """A configuration file, if it is not there as it should be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(raw), sort_keys=False)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of later parts over those of earlier ones, key by key."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merge(result[key], value) if both else (dict(value) if isinstance(value, Mapping) else value)
    return result


def whole_phases(raw: dict[str, Any]) -> dict[str, Any]:
    """As many more steps as make all phases of a fine-tuning equally long."""
    count = len(raw.get("finetune", {}).get("phases", [0]))
    return merge(raw, {"train": {"num_steps": math.ceil(step_count(raw) / count) * count}})


def step_count(raw: dict[str, Any]) -> int:
    return _built(raw).train.num_steps


def _built(raw: dict[str, Any]) -> RunConfig:
    return build_config(raw, "scale")


def sequence_flops(raw: dict[str, Any], length: int) -> float:
    """Model flops of one fine-tuning sequence, forward. The vocabulary is the default one's: it is not known yet."""
    config = _built(raw)
    return forward_flops(config.model, length, _MARKERS if config.finetune.markers else 0)


def training_flops(raw: dict[str, Any], steps: int) -> float:
    """Model flops of so many steps, forward and backward."""
    config = _built(raw)
    if "finetune" in raw:
        forward = sum(sequence_flops(raw, bound) for bound in config.finetune.phases) / len(config.finetune.phases)
    else:
        forward = forward_flops(config.model, config.data.sequence_length, config.data.num_meta_tokens)
    return 3 * steps * config.train.global_batch_size * forward
