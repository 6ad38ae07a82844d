"""What an engine computes on a GPU, all in one process: losses of every precision and ZeRO stage, kernels, a resume.

    python -m tests.support.gpu_cases found.json                    what tests/engine/test_gpu.py compares
    python -m tests.support.gpu_cases found.json --device cpu NAME  some cases, where there is no GPU
    python -m tests.support.gpu_cases --write                       float32 losses of this CPU, into tests/golden

The file is written anew after each case, so that what was found before a time limit counts.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megameta.cluster.launch import initialize_process_group, make_topology
from megameta.config import RunConfig, build_config
from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.counter_random import make_key, stream
from megameta.engine.build import settle_on
from megameta.engine.pipeline_engine import make_engine
from megameta.files import write_text_atomically
from megameta.parallel.topology import Topology
from tests.support.paths import GOLDEN
from tests.support.training import full_state, step_loader, take_steps

LOSSES = GOLDEN / "gpu.json"
STEPS, MOVE_AT = 6, 3
VOCABULARY = 512
VALUES: dict[str, dict[str, Any]] = {
    "run": {"seed": 5},
    "model": {"vocab_size": VOCABULARY, "hidden_size": 128, "num_layers": 2, "num_heads": 2, "initializer_range": 0.1},
    "data": {"sequence_length": 128},
    "train": {"num_steps": STEPS, "micro_batch_size": 4, "global_batch_size": 16, "compile": "none"},
    "optimizer": {"lr": 4e-3, "warmup_steps": 2},
    "log": {"tensorboard": False},
}
PLAIN: dict[str, dict[str, Any]] = {}
DOCUMENTS = {"data": {"document_mask": True, "reset_positions": True}}
#: What float32 losses are kept of, and the name in the file.
KEPT = {"plain": PLAIN, "documents": DOCUMENTS}
#: Largest deviation of a loss from the float32 one on a CPU, relative.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}


def write_corpus(folder: Path) -> str:
    """Text to learn from, the same on every machine: documents in which most tokens follow from the one before."""
    prefix = str(folder / "train")
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in range(120):
            noise = stream(make_key("gpu", document), 20 + 11 * (document % 17)).astype(np.int64)
            token = np.arange(len(noise)) * (1 + document % 5) + document
            writer.add_document(np.where(noise % 5 == 0, noise // 5, token) % (VOCABULARY - 1))
    return prefix


def make_config(corpus: str, *changes: dict[str, dict[str, Any]]) -> RunConfig:
    """The run of a case."""
    values = {name: dict(section) for name, section in VALUES.items()}
    values["data"]["train"] = [corpus]
    for change in changes:
        for name, section in change.items():
            values[name] = values.get(name, {}) | section
    return build_config(values)


def train(config: RunConfig, topology: Topology, parts: tuple[int, ...] = (STEPS,)) -> list[float]:
    """Losses of an engine; with several ``parts`` (last steps) each goes on from the state of the one before."""
    losses: list[float] = []
    first, state = 1, None
    for last in parts:
        engine = make_engine(config, topology, state[0] if state is not None else None)
        if state is not None:
            engine.state.load_moments(state[1], first - 1)
        loader = step_loader(config, topology)
        losses += [result.loss for result in take_steps(engine, loader, config, first, last)]
        loader.close()
        state = full_state(engine)
        engine.destroy()
        first = last + 1
    return losses


def followed(change: dict[str, dict[str, Any]], corpus: str, topology: Topology) -> dict[str, Any]:
    """A case of losses."""
    return {"losses": train(make_config(corpus, change), topology)}


def resumed(change: dict[str, dict[str, Any]], corpus: str, topology: Topology) -> dict[str, Any]:
    """With deterministic kernels: the same run whole, again, and in two parts."""
    config = make_config(corpus, DOCUMENTS, {"run": {"deterministic": True}}, change)
    try:
        whole, again = train(config, topology), train(config, topology)
        found = {"whole": whole, "again": again, "resumed": train(config, topology, (MOVE_AT, STEPS))}
        is_on = torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" in os.environ
        return {**found, "deterministic": is_on}
    finally:
        torch.use_deterministic_algorithms(False)  # they would stay for the rest of the process


def settled(corpus: str, topology: Topology) -> dict[str, Any]:
    """What precision a run gets that asks for none."""
    return {"precision": settle_on(make_config(corpus), topology).train.precision}


Case = Callable[[str, Topology], dict[str, Any]]


def _losses(precision: str, zero: int = 0, change: dict[str, dict[str, Any]] | None = None, **train: Any) -> Case:
    own = {"train": {"precision": precision, **train}, "parallel": {"zero_stage": zero}, **(change or {})}
    return partial(followed, own)


#: ZeRO 3 comes last, as it leaves a linear of its own in torch's place; what needs a compiler before it.
CASES: dict[str, Case] = {
    "auto": settled,
    **{f"{p}, ZeRO {z}": _losses(p, z) for z in (0, 1, 2) for p in ("bf16", "fp32", "fp16")},
    **{f"{p}, documents": _losses(p, change=DOCUMENTS) for p in ("bf16", "fp32")},
    "bf16, fused loss": _losses("bf16", fused_loss=True),
    "bf16, recomputed": _losses("bf16", activation_checkpointing=True),
    "fp32, deterministic resume": partial(resumed, {"train": {"precision": "fp32"}}),
    "bf16, deterministic resume": partial(resumed, {"train": {"precision": "bf16"}}),
    "bf16, documents, compiled": _losses("bf16", change=DOCUMENTS, compile="blocks", fused_loss=True),
    "bf16, deterministic resume, compiled": partial(resumed, {"train": {"precision": "bf16", "compile": "blocks"}}),
    **{f"{p}, ZeRO 3": _losses(p, 3) for p in ("bf16", "fp32", "fp16")},
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    topology = make_topology("cpu" if arguments.write else arguments.device)
    initialize_process_group(topology)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder))
        if arguments.write:
            fp32 = {"train": {"precision": "fp32"}}
            kept = {name: train(make_config(corpus, change, fp32), topology) for name, change in KEPT.items()}
            LOSSES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            return
        found: dict[str, Any] = {}
        for name in arguments.names or CASES:
            start = time.perf_counter()
            try:
                found[name] = CASES[name](corpus, topology)
            except Exception as error:  # the others go on; the test of this one tells it
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["seconds"] = time.perf_counter() - start
            print(f"{name}: {found[name].get('error', 'ran')}, {found[name]['seconds']:.1f} s", flush=True)
            write_text_atomically(arguments.file, json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may abort a normal exit


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
