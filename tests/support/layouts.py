"""A layout against one process: the model, twenty steps, and every comparison that the grid and its mutations use.

The reference is a plain float64 loop over single samples in one process (``oracle_run``): no DeepSpeed, no collectives.
"""

import dataclasses
import gc
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megameta.config import RunConfig, build_config
from megameta.config.validate import validate
from megameta.engine import compile
from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule, sum_scores
from megameta.engine.pipeline_engine import make_engine
from megameta.engine.replicas import differing_replicas
from megameta.model.shapes import parameter_shapes
from megameta.parallel.tensor_parallel import shard_dim
from megameta.parallel.topology import Topology
from megameta.train.evaluation import Evaluator
from tests.support.training import full_state, oracle_run, step_loader, take_steps, write_corpus

STEPS = 20
LENGTH, VOCABULARY, META = 32, 950, 949
#: Relative: a gradient by norm, a step's loss, its gradient norm, the evaluation loss.
TOLERANCE = {"gradient": 1e-5, "loss": 1e-5, "norm": 1e-4, "evaluation": 1e-5}

#: Factors beside the layout, each with what it changes; the first level of all of them is "all switches on".
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "meta": {
        "on": {},
        "off": {"model__meta_attention": False, "data__meta_token_fraction": 0.0},
        "first layer": {"model__meta_layers": [0]},
        "second layer": {"model__meta_layers": [1]},
    },
    "position": {
        "rope": {},
        "ape": {"model__position": "ape"},
        "rnope": {"model__position": "rnope"},
        "yarn": {
            "model__position_scaling": "yarn",
            "model__position_scaling_factor": 4.0,
            "model__original_max_position_embeddings": LENGTH // 4,
            "model__zero_meta_positions": True,
        },
    },
    "documents": {
        "restart": {"data__document_mask": True, "data__reset_positions": True},
        "mask": {"data__document_mask": True},
        "none": {},
    },
    "recompute": {"on": {"train__activation_checkpointing": True}, "off": {}},
    "embedding": {"tied": {}, "untied": {"model__tie_embeddings": False}},
    "block": {
        "full": {"model__bias": True, "model__qk_norm": True, "model__num_key_value_heads": 8},
        "swiglu": {"model__activation": "swiglu", "model__norm": "rmsnorm"},
        "parallel": {"model__parallel_residual": True, "model__rotary_fraction": 0.5, "model__bias": True},
        "plain": {},
    },
    "sequence": {"on": {"parallel__sequence_parallel": True}, "off": {}},
    "micro": {"2": {"train__micro_batch_size": 2}, "1": {"train__micro_batch_size": 1}},
    "loss": {"logits": {}, "fused": {"train__fused_loss": True}},
    "compile": {"none": {}, "blocks": {"train__compile": "blocks"}},
    "precision": {"fp32": {}, "bf16": {"train__precision": "bf16"}},
}
ALL_ON = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and a level of each factor."""

    tensor: int
    pipeline: int
    data: int
    zero: int
    factors: tuple[tuple[str, str], ...] = tuple(ALL_ON.items())

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def levels(self) -> dict[str, str]:
        return dict(self.factors)

    @property
    def changed(self) -> str:
        """Levels that are not those of "all switches on"."""
        return ", ".join(f"{k} {v}" for k, v in self.factors if ALL_ON[k] != v and self._applies(k)) or "all on"

    def _applies(self, factor: str) -> bool:
        return factor != "sequence" or self.tensor > 1

    def __str__(self) -> str:
        return f"TP {self.tensor} × PP {self.pipeline} × DP {self.data}, ZeRO {self.zero}: {self.changed}"


def layouts(worlds: tuple[int, ...] = (1, 2, 4, 8)) -> list[Case]:
    """Every TP × PP × DP × ZeRO layout of these world sizes that validate.py allows, all switches on."""
    return [
        Case(tensor, pipeline, world // (tensor * pipeline), zero)
        for world in worlds
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8)
        if world % (tensor * pipeline) == 0
        for zero in ((0, 1, 2, 3) if pipeline == 1 else (1,))
    ]


def make_config(case: Case, corpus: str) -> RunConfig:
    """The run of a case. Output projections start large enough to matter, and clipping acts on some of the steps."""
    values: dict[str, dict[str, Any]] = {
        "run": {"seed": 11, "device": "cpu"},
        "model": {
            "vocab_size": VOCABULARY,
            "meta_token_id": META,
            "hidden_size": 64,
            "num_layers": max(2, case.pipeline),
            "num_heads": 16,
            "intermediate_size": 176,
            "initializer_range": 0.3,
            "max_position_embeddings": LENGTH,
        },
        "data": {
            "train": corpus,
            "valid": {"held": [corpus]},
            "sequence_length": LENGTH,
            "meta_token_fraction": 0.25,
        },
        "train": {"num_steps": STEPS, "micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 5, "clip_grad_norm": 1.0},
        "parallel": {
            "tensor_parallel_size": case.tensor,
            "pipeline_parallel_size": case.pipeline,
            "zero_stage": case.zero,
        },
        "eval": {"num_samples": 19},
        "log": {"tensorboard": False},
    }
    for factor, level in case.factors:
        for key, value in FACTORS[factor][level].items():
            section, name = key.split("__")
            values[section][name] = value
    if case.tensor == 1:
        values["parallel"]["sequence_parallel"] = False
    if case.tensor >= 4:
        values["train"]["micro_batch_size"] = 4  # their collectives take long, where cores are few
    per_pass = values["train"]["micro_batch_size"] * case.data
    if 8 % per_pass:
        values["train"]["micro_batch_size"] = 8 // case.data
    return build_config(values)


def make_corpus(folder: Path) -> str:
    """Text over the whole vocabulary, so that every tensor-parallel rank has targets."""
    return write_corpus(folder / "parity", tokens=6000, seed=3, vocabulary=META)


# --- one process ----------------------------------------------------------------------------------------------------


def reference(case: Case, corpus: str, steps: int = STEPS) -> dict[str, Any]:
    """The same run by the oracle, its initial weights, and held-out losses of its last weights."""
    config = make_config(case, corpus)  # its layout means nothing to the oracle
    torch.set_num_threads(1)
    out = oracle_run(config, steps)
    out["initial"] = dict(build_model(config).named_parameters())
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(out["weights"][name])
    module, evaluator = LossModule(model.double()).eval(), Evaluator(config, Topology())
    out["evaluation"] = {}
    with torch.no_grad():
        for name in evaluator.sets:
            total, counts = sum_scores(partial(module, score=True), evaluator.batches(name), None, "cpu")
            out["evaluation"][name] = float(total[0]) / counts[0]
    rows = {name: shape[0] for name, shape in parameter_shapes(config.model).items()}
    for part in ("initial", "gradients", "weights"):
        out[part] = {name: tensor.detach()[: rows[name]] for name, tensor in out[part].items()}
    return out


# --- many processes -------------------------------------------------------------------------------------------------


def run_case(
    topology: Topology, case: Case, corpus: str, steps: int = STEPS, mutation: Any = nullcontext
) -> dict[str, Any]:
    """Train under a layout; what the first rank of each stage saw. Collective."""
    config = make_config(case, corpus)
    topology = dataclasses.replace(topology, tensor_parallel_size=case.tensor, pipeline_parallel_size=case.pipeline)
    validate(config, world_size=topology.world_size, device="cpu")
    start = time.perf_counter()
    # Tracing and the backward pass of what is traced are the same; a machine's compiler would take a minute a case.
    with mutation(), mock.patch.object(compile, "BACKEND", "aot_eager"):
        engine = make_engine(config, topology)
        initial, _ = full_state(engine)
        loader = step_loader(config, topology)
        gradients = _catch_gradients(engine)
        results = take_steps(engine, loader, config, 1, steps)
        evaluated = Evaluator(config, topology).run(engine)
        report = {
            "seconds": time.perf_counter() - start,
            "losses": [r.loss for r in results],
            "norms": [r.grad_norm for r in results],
            "targets": [r.num_targets for r in results],
            "evaluation": {name: result.loss for name, result in evaluated.items()},
            "replicas": differing_replicas(engine.state),
            "sharded": all(
                p.numel() < math.prod(engine.state.shapes[name])
                for name, p in engine.state.parameters.items()
                if case.tensor > 2 and shard_dim(name) is not None and case.zero < 3
            ),
        }
        if topology.data_parallel_rank == topology.tensor_parallel_rank == 0:
            report |= {"gradients": gradients, "initial": initial}
        loader.close()
        engine.destroy()
        del engine
        gc.collect()  # DeepSpeed's __del__ costs 15 s where the trace of the next case's compiler is interrupted by it
    return report


def _catch_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Whole gradients of the first step, taken between its last backward and its update."""
    found: dict[str, torch.Tensor] = {}
    read = engine._read

    def look(*args: Any) -> Any:
        found.update({name: engine.state.gradient(name) for name in engine.state.parameters})
        engine._read = read
        return read(*args)

    engine._read = look
    return found


def run_cases(topology: Topology, cases: list[Case], corpus: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """Several cases of one world size in the same processes. ZeRO 3 patches torch for good, so it comes last."""
    reports = []
    for number, case in enumerate(cases, 1):
        reports.append(run_case(topology, case, corpus, steps))
        if topology.is_main:
            print(f"  ran {number} of {len(cases)} ({reports[-1]['seconds']:.0f} s): {case}", flush=True)
    return reports


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Comparison:
    """The largest deviation of each kind, and what broke a bound: (kind, words)."""

    worst: dict[str, float]
    violations: list[tuple[str, str]]
    note: str = ""


def compare_bf16(reports: list[dict[str, Any]], alone: list[dict[str, Any]], expected: dict[str, Any]) -> Comparison:
    """A layout in bf16: its error against the float64 reference is within twice that of one bf16 process."""
    own, error = bf16_errors(alone, expected), bf16_errors(reports, expected)
    violations = [("replicas", "; ".join(r["replicas"][:3])) for r in reports if r["replicas"]]
    violations += [
        (kind, f"{error[kind]:.1e}, one process {own[kind]:.1e}") for kind in error if not error[kind] <= 2 * own[kind]
    ]
    return Comparison({kind: error[kind] / own[kind] for kind in error}, violations)


def bf16_errors(reports: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """Of all gradients together, by norm; of losses and gradient norms, root mean square over the steps; of the
    held-out loss, but at least that of the training losses (a single number may hit by chance)."""
    gradients = {name: g for report in reports for name, g in report.get("gradients", {}).items()}
    names = expected["gradients"]
    difference = math.sqrt(sum(float((gradients[n].double() - g).pow(2).sum()) for n, g in names.items()))
    whole = math.sqrt(sum(float(g.pow(2).sum()) for g in names.values()))
    rms = {
        kind: math.sqrt(sum(e * e for _, e in _series(reports[:1], expected, key)) / len(expected[key]))
        for kind, key in (("loss", "losses"), ("norm", "norms"))
    }
    held_out = max(relative(reports[0]["evaluation"][n], v) for n, v in expected["evaluation"].items())
    return {"gradient": difference / whole, **rms, "evaluation": max(held_out, rms["loss"])}


def relative(value: float, expected: float) -> float:
    """Not finite counts as infinite."""
    error = abs(value - expected) / abs(expected)
    return error if math.isfinite(error) else math.inf


def compare(reports: list[dict[str, Any]], expected: dict[str, Any]) -> Comparison:
    """Reports of all ranks against the reference."""
    violations: list[tuple[str, str]] = []
    gradients: dict[str, torch.Tensor] = {}
    for report in reports:
        for name, gradient in report.get("gradients", {}).items():
            if name in gradients and float((gradient - gradients[name]).norm()) > 1e-6 * float(gradient.norm()):
                violations.append(("tied", f"{name}: the two copies' gradients differ"))
            gradients[name] = gradient
        for name, weight in report.get("initial", {}).items():
            if not torch.equal(weight, expected["initial"][name]):
                violations.append(("initial", name))
        if report["replicas"]:
            violations.append(("replicas", "; ".join(report["replicas"][:3])))
        if report["targets"] != expected["targets"]:
            violations.append(("targets", "the ranks read other samples"))
        if not report["sharded"]:
            violations.append(("sharded", "a rank holds a whole sharded weight"))
    if gradients.keys() != expected["gradients"].keys():
        violations.append(("gradient", f"missing: {expected['gradients'].keys() ^ gradients.keys()}"))
    whole = math.sqrt(sum(float(g.pow(2).sum()) for g in expected["gradients"].values()))
    errors = {}
    for name in expected["gradients"].keys() & gradients.keys():
        g = expected["gradients"][name]
        # Some gradients are zero in exact arithmetic, such as a key bias' without rotation: rounding is all there is.
        size = g.norm() if g.norm() > 1e-12 * whole else whole
        errors[name] = float((gradients[name].double() - g).norm() / size)
    pairs = {
        "gradient": list(errors.items()),
        "loss": _series(reports, expected, "losses"),
        "norm": _series(reports, expected, "norms"),
        "evaluation": [
            (name, relative(report["evaluation"][name], value))
            for report in reports
            for name, value in expected["evaluation"].items()
        ],
    }
    worst = {}
    for kind, values in pairs.items():
        where, worst[kind] = max(values, key=lambda pair: pair[1])
        if not worst[kind] <= TOLERANCE[kind]:
            violations.append((kind, f"{where}: {worst[kind]:.1e}"))
    return Comparison(worst, violations)


def _series(reports: list[dict[str, Any]], expected: dict[str, Any], key: str) -> list[tuple[str, float]]:
    return [
        (f"step {step}", relative(value, wanted))
        for report in reports
        for step, (value, wanted) in enumerate(zip(report[key], expected[key], strict=True), 1)
    ]
