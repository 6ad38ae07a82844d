"""How large an experiment is: models, data, steps, seeds. Files in scales/, or one of the user's own."""

# ruff: noqa: RUF012 - pydantic copies the defaults

from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import Field

from megameta.config import Section, load_raw
from megameta.errors import UserError
from megameta.paper.reproduce.arms import ARMS, find_arms
from megameta.paper.tasks.definitions import DIFFICULTIES, TASKS


class CorpusPart(Section):
    """What the models are pre-trained on."""

    inputs: list[str] = []
    """Files, globs or directories that tools/preprocess_data.py reads. Default: the Python standard library's text."""
    heldout_inputs: list[str] = []
    """Held-out text. Default: with inputs, the last documents of each (see heldout_percent)."""
    heldout_percent: float = Field(2.0, gt=0, lt=50)
    """Share of documents held out where heldout_inputs names none."""
    tokenizer: str | None = None
    """A tokenizer. Default: byte-level BPE trained on the corpus and the tasks' words."""
    vocab_size: int = Field(4096, ge=258)
    """Of the tokenizer that is trained."""
    max_bytes: int | None = None
    """Of training text, for the default corpus."""


class TasksPart(Section):
    """The examples."""

    names: list[str] = list(TASKS)
    bins: list[int]
    """Length bins in tokens."""
    difficulties: list[str] = list(DIFFICULTIES)
    train: int = Field(90_000, ge=1)
    test: int = Field(10_000, ge=1)
    """Examples of each task."""


class Table1Part(Section):
    """Context extension by YaRN: models of ``window`` slots, extended and fine-tuned at multiples of it."""

    arms: list[str] = ["meta-rope"]
    window: int = Field(ge=8)
    pretrain: dict[str, Any] = {}
    extend: dict[str, Any] = {}
    finetune: dict[str, Any] = {}
    """Keys of the run configuration that differ from those of the scale."""
    tasks: TasksPart
    """bins: up to 10 windows."""


class InferencePart(Section):
    """Speed of decoding. Weights are random: speed does not depend on them."""

    model: dict[str, Any] = {}
    prompt: int = Field(512, ge=1)
    """Text tokens of the prompt."""
    new_tokens: int = Field(64, ge=2)
    rounds: int = Field(7, ge=3)
    """Paired measurements."""


class Scale(Section):
    """One scale. ``model``, ``pretrain`` and ``finetune`` are keys of the run configuration (docs/configuration.md)."""

    description: str
    seeds: list[int] = [1]
    arms: list[str] = ["gpt2-ape", "gpt2-rope", "pause-rope", "meta-rope"]
    corpus: CorpusPart = CorpusPart()
    tasks: TasksPart
    model: dict[str, Any] = {}
    pretrain: dict[str, Any] = {}
    finetune: dict[str, Any] = {}
    phases: list[int]
    """Bins of the fine-tuning's phases."""
    test_examples: int = Field(1000, ge=1)
    """Examples of a cell (task and bin) in the final evaluation."""
    table1: Table1Part | None = None
    inference: InferencePart = InferencePart()
    jobs: int = Field(0, ge=0)
    """Runs at a time. 0: one a GPU, or one a core."""
    processes: int = Field(1, ge=1)
    """Ranks of a run (GPUs)."""


def scale_names() -> list[str]:
    """Those that come with the package."""
    return sorted(
        entry.name[:-5]
        for entry in resources.files(__package__).joinpath("scales").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_scale(name: str, overrides: list[str]) -> Scale:
    """A scale of the package by name, or one of the user's own from a YAML file.

    Raises:
        UserError: there is none; a key is unknown or a value does not fit.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in scale_names():
            raise UserError(f"no scale {name}; there are {', '.join(scale_names())}, or give a YAML file of your own")
        with resources.as_file(resources.files(__package__).joinpath("scales", f"{name}.yaml")) as found:
            raw = load_raw(found, overrides)
    else:
        raw = load_raw(path, overrides)
    scale = build_part(Scale, raw, name)
    _check(scale, name)
    return scale


Part = TypeVar("Part", bound=Section)


def build_part(kind: type[Part], raw: dict[str, Any], source: str) -> Part:
    """Typed values from plain ones. Raises UserError with every problem, by key."""
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError("\n  ".join([f"{source}: {len(problems)} problem(s)", *problems])) from error


def _check(scale: Scale, name: str) -> None:
    find_arms(scale.arms)
    for part in [scale.tasks, *([scale.table1.tasks] if scale.table1 else [])]:
        unknown = [task for task in part.names if task not in TASKS]
        unknown += [level for level in part.difficulties if level not in DIFFICULTIES]
        if unknown:
            raise UserError(f"scale {name}: tasks: no {unknown[0]}; there are {', '.join([*TASKS, *DIFFICULTIES])}")
    missing = [bound for bound in scale.phases if bound not in scale.tasks.bins]
    if missing or not scale.phases or list(scale.phases) != sorted(set(scale.phases)):
        raise UserError(
            f"scale {name}: phases are some of tasks.bins {scale.tasks.bins}, ascending; not {scale.phases}"
        )
    if not scale.seeds or len(set(scale.seeds)) < len(scale.seeds):
        raise UserError(f"scale {name}: seeds {scale.seeds}: one or more, all different")
    if scale.table1:
        find_arms(scale.table1.arms)
        wrong = [arm for arm in scale.table1.arms if ARMS[arm].position != "rope"]
        if wrong:
            raise UserError(f"scale {name}: table1.arms: {wrong[0]} has no rotary positions, which YaRN extends")
