"""Checkpoints that move between layouts: trained under one, taken up by others, and taken back."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megameta.checkpoint import TrainerState, open_checkpoint, save_distributed
from megameta.engine.pipeline_engine import make_engine
from megameta.parallel.topology import Topology
from megameta.train.schedule import learning_rate
from tests.support.layouts import STEPS, Case, make_config, relative
from tests.support.training import step_loader

#: Where the chain starts, and where it goes: (TP, PP, DP, ZeRO).
START = Case(2, 2, 2, 1)
LAYOUTS = [
    Case(*layout)
    for layout in (
        *((1, 1, 1, 0), (1, 2, 1, 1), (2, 1, 1, 2), (1, 1, 2, 3)),
        *(
            (2, 2, 1, 1),
            (2, 1, 2, 3),
            (1, 1, 4, 2),
            (4, 1, 2, 1),
            (1, 2, 4, 1),
            (4, 1, 2, 3),
            (2, 1, 4, 0),
            (2, 2, 2, 1),
        ),
    )
]


def go_on(topology: Topology, case: Case, corpus: str, source: str | None, folder: str, last: int) -> dict[str, Any]:
    """Take up a checkpoint (None: begin), save it again at once, train to step ``last`` and save that. Collective.

    Returns:
        losses by step; whether the copy is bitwise its source, which rank 0 looks at.
    """
    config = make_config(case, corpus)
    topology = dataclasses.replace(topology, tensor_parallel_size=case.tensor, pipeline_parallel_size=case.pipeline)
    step, weights, same = 0, None, True
    checkpoint = open_checkpoint(source, topology) if source else None
    if checkpoint:
        step, weights = checkpoint.trainer().step, checkpoint.weights()
    engine = make_engine(config, topology, weights)
    if checkpoint:
        engine.state.load_moments(checkpoint.moments(), checkpoint.trainer().optimizer_step)
        copy = Path(folder) / "copy"
        save_distributed(copy, config, engine.state, checkpoint.trainer(), topology)
        same = topology.rank > 0 or same_tensors(copy, checkpoint.path)
    loader = step_loader(config, topology)
    losses = {}
    for number in range(step + 1, last + 1):
        lr = learning_rate(number, STEPS, config.optimizer)
        losses[number] = engine.train_step(loader.read(number - 1, number), lr).loss
    state = TrainerState(last, last, 0, 0, engine.state.optimizer_step)
    save_distributed(Path(folder) / f"step_{last}", config, engine.state, state, topology)
    loader.close()
    engine.destroy()
    return {"losses": losses, "same": same, "optimizer_step": state.optimizer_step}


def go_on_many(topology: Topology, moves: list[tuple], corpus: str) -> list[dict[str, Any]]:
    """Several of (case, source, folder, last) of one world size in the same processes."""
    return [go_on(topology, case, corpus, source, folder, last) for case, source, folder, last in moves]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in ((a.weights(), b.weights()), (a.moments(), b.moments()))
    )


def worst_loss(report: dict[str, Any], expected: list[float]) -> float:
    """Largest relative deviation of the losses from the reference's."""
    return max(relative(loss, expected[step - 1]) for step, loss in report["losses"].items())
