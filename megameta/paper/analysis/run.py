"""``megameta analyze``: what meta-tokens do inside a model, as a report with figures and the numbers behind them."""

import datetime
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from megameta.cluster.launch import pick_device
from megameta.cluster.machine import machine_facts
from megameta.config import RunConfig
from megameta.config.validate import validate
from megameta.errors import UserError
from megameta.log import duration
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.registry import ANALYSES, Options
from megameta.paper.analysis.report import PAGE, check_output, write_report
from megameta.train.offline import load_source

if TYPE_CHECKING:
    from megameta.paper.analysis.subject import Subject


def analyze(
    words: list[str],
    *,
    output: str,
    options: Options,
    data: list[str] | None = None,
    twin: str | None = None,
    command: str = "megameta analyze",
) -> int:
    """Run all analyses, or one, and write the report.

    Args:
        words: [FIGURES] [MODEL] [a.b=c …].
        data: prefixes of tokenised held-out text, in place of the configuration's.
        twin: a model to stand beside.
        command: what the person typed, for the report.

    Raises:
        UserError: words that make no sense, or a single analysis that the model has not what it takes for.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    chosen = [names.pop(0)] if names and names[0] in ANALYSES else list(ANALYSES)
    needs_model = any(ANALYSES[name].needs != "nothing" for name in chosen)
    if len(names) != (1 if needs_model else 0):
        raise UserError(_usage(names))
    check_output(Path(output))
    console = Console()
    subject = load_subject(names[0], overrides, data, twin) if needs_model else None
    if subject is not None:
        options = _checked(options, subject)
    start = time.perf_counter()
    findings, left_out = _run(chosen, subject, options, console)
    if not findings:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    title = "Inside the model: what meta-tokens do" if len(chosen) > 1 else f"megameta analyze {chosen[0]}"
    ran = _ran(command, subject, options, time.perf_counter() - start)
    with console.status("writing the report"):
        write_report(Path(output), title, findings, left_out, ran)
    console.print(f"report: {Path(output) / PAGE} ({len(findings)} figures)", soft_wrap=True)
    console.print("next: open it in a browser; docs/analysis.md says how to read each figure", soft_wrap=True)
    return 0


def _usage(names: list[str]) -> str:
    given = f"{' '.join(names)}: " if names else ""
    return (
        f"{given}give one model (a run, a checkpoint, or a HuggingFace export), after at most one of"
        f" {', '.join(ANALYSES)}"
    )


def _checked(options: Options, subject: "Subject") -> Options:
    layers = subject.config.model.num_layers
    wrong = [layer for layer in options.layers if not 0 <= layer < layers]
    if wrong:
        raise UserError(f"--layers {wrong[0]}: {subject.name} has layers 0 to {layers - 1}")
    if options.num_samples < 1:
        raise UserError(f"--samples {options.num_samples}: at least 1")
    return replace(options, num_samples=min(options.num_samples, subject.num_held_out))


def load_subject(source: str, overrides: list[str], data: list[str] | None, twin: str | None) -> "Subject":
    """The model, its held-out text, and its twin."""
    from megameta.paper.analysis.subject import Subject

    config, weights = _load(source, overrides, data)
    device = pick_device(config.run.device)
    validate(config, world_size=1, device=device)
    subject = Subject.of(source, config, weights, device)
    return subject if twin is None else subject.with_twin(twin, *_load(twin, [], None))


def _load(source: str, overrides: list[str], data: list[str] | None) -> tuple[RunConfig, Mapping[str, torch.Tensor]]:
    config, weights = load_source(source, overrides)
    if data:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"valid": {"data": data}, "split": None})}
        )
    told = any(word.startswith("data.meta_token_fraction=") for word in overrides)
    if (Path(source) / "config.json").is_file() and not config.model.meta_attention and not told:
        # An export does not say how its text was read; without the branch, as plain text.
        config = config.model_copy(update={"data": config.data.model_copy(update={"meta_token_fraction": 0.0})})
    return config, weights


def _run(
    chosen: list[str], subject: "Subject | None", options: Options, console: Console
) -> tuple[list[Finding], dict[str, str]]:
    findings: list[Finding] = []
    left_out: dict[str, str] = {}
    for number, name in enumerate(chosen, 1):
        analysis = ANALYSES[name]
        place = f"[{number}/{len(chosen)}] {name}"
        reason = None if subject is None else analysis.obstacle(subject)
        if reason is not None:
            left_out[name] = reason
            console.print(f"{place}: left out: {reason}", soft_wrap=True, highlight=False, markup=False)
            continue
        start = time.perf_counter()
        with console.status(f"{name}: {analysis.help}"):
            found = analysis.load()(options) if analysis.needs == "nothing" else analysis.load()(subject, options)
        if name == "cache" and subject is not None:
            found = [*found, *_on_tasks(subject, options, left_out)]
        findings += found
        took = duration(time.perf_counter() - start)
        console.print(f"{place}: {len(found)} figures, {took}", soft_wrap=True, highlight=False, markup=False)
    return findings, left_out


def _on_tasks(subject: "Subject", options: Options, left_out: dict[str, str]) -> list[Finding]:
    """The cache on test examples of the last phase, where the model was fine-tuned on tasks."""
    from megameta.finetune.data import TaskEvaluator
    from megameta.paper.analysis.cache_sizes import task_finding
    from megameta.parallel.topology import Topology

    tuning = subject.config.finetune
    if tuning.directory is None:
        return []
    if not Path(tuning.directory).is_dir():
        left_out["cache, on tasks"] = f"{tuning.directory} is not there: finetune.directory=DIR says where it is"
        return []
    wanted = {"eval_bins": tuning.phases[-1:], "eval_examples": options.num_samples}
    config = subject.config.model_copy(update={"finetune": tuning.model_copy(update=wanted)})
    evaluator = TaskEvaluator(config, Topology(device=subject.device))
    sets = {name: [batch.to(subject.device) for batch in evaluator.batches(name)] for name in evaluator.sets}
    return [task_finding(subject, sets, options)] if sets else []


def _ran(command: str, subject: "Subject | None", options: Options, seconds: float) -> dict[str, str]:
    facts = {"command": command}
    if subject is not None:
        model, form = subject.config.model, subject.form
        facts |= {
            "model": f"{subject.name}: {model.num_layers} layers × {model.hidden_size}, {model.num_heads} heads,"
            f" positions {model.position}, meta branch {'yes' if subject.has_branch else 'no'}",
            "twin": "none" if subject.twin is None else subject.twin.name,
            "held-out text": f"{subject.set_name}: {options.num_samples} of {subject.num_held_out:,} windows, evenly"
            f" spread, {form.text_per_sample} text tokens and {form.num_meta_tokens} meta-tokens each",
            "places of meta-tokens": f"seed {form.seed} (run.seed)",
            "device": subject.device,
        }
    facts |= {"seed of what is drawn": str(options.seed), "time": duration(seconds)}
    return facts | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()} | machine_facts()
