"""A step of the engine (DeepSpeed) over one of a plain torch loop: the same model, batch, clipping and fused AdamW.

    BENCHMARK_CLOCK=cpu OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py --pairs 20
    OMP_NUM_THREADS=1 python benchmarks/engine_overhead.py --rows plain compile fused

One process (``paired.py`` says what BENCHMARK_CLOCK counts). The baseline of each "engine" row is the plain loop with
the same switches.
"""

import argparse
import os
import platform
from collections.abc import Callable

import torch
from paired import CLOCK, HEADER, measure, ratio, seconds
from step_time import make_batch

from megameta.cluster.launch import initialize_process_group, make_topology
from megameta.config import RunConfig, build_config
from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.engine.build import build_model
from megameta.engine.compile import compile_blocks
from megameta.engine.engine import Engine
from megameta.engine.loss_module import LossModule
from megameta.engine.optimizer import make_optimizer

#: Switches of train.* by row.
SWITCHES = {
    "plain": {"compile": "none", "fused_loss": False},
    "compile": {"compile": "blocks", "fused_loss": False},
    "fused": {"compile": "none", "fused_loss": True},
    "both": {"compile": "blocks", "fused_loss": True},
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_config(arguments: argparse.Namespace, switches: dict, stage: int) -> RunConfig:
    """The run of a row."""
    model = {"hidden_size": arguments.width, "num_layers": arguments.layers, "num_heads": arguments.width // 64}
    train = {"micro_batch_size": arguments.batch, "global_batch_size": arguments.batch}
    values = {
        "run": {"device": arguments.device},
        "model": {**model, "vocab_size": arguments.vocabulary, "meta_token_id": arguments.vocabulary - 1},
        "data": {"sequence_length": arguments.length},
        "train": {**train, "precision": arguments.precision, **switches},
        "parallel": {"zero_stage": stage},
    }
    values["model"]["max_position_embeddings"] = arguments.length
    return build_config(values)


def random_batch(config: RunConfig) -> Batch:
    """Random text with meta-tokens; no loss where the target is one."""
    data, model = config.data, config.model
    token_BT = make_batch(model, config.train.micro_batch_size, data.sequence_length, data.meta_token_fraction, "cpu")
    label_BT = token_BT.roll(-1, dims=1)
    label_BT[:, -1] = IGNORE_INDEX
    label_BT[label_BT == model.meta_token_id] = IGNORE_INDEX
    return Batch(token_BT, label_BT, None, None, data.num_meta_tokens, tuple(range(len(token_BT))))


def timed(step: Callable[[], object], arguments: argparse.Namespace) -> Callable[[], float]:
    """The seconds of a step."""

    def run() -> float:
        start = seconds()
        step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return seconds() - start

    return run


def plain_step(config: RunConfig, batch: Batch, arguments: argparse.Namespace) -> Callable[[], float]:
    """Forward, backward, clipping and fused AdamW in a loop of one's own."""
    module = LossModule(build_model(config), fused=config.train.fused_loss).to(arguments.device)
    if config.train.compile == "blocks":
        compile_blocks(module, arguments.device)
    optimizer, dtype = make_optimizer(module, config.optimizer), PRECISIONS[config.train.precision]

    def step() -> float:
        moved = batch.to(arguments.device)
        with torch.autocast(arguments.device, dtype, enabled=dtype != torch.float32):
            loss = module(moved) / batch.num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed(step, arguments)


def engine_step(config: RunConfig, batch: Batch, arguments: argparse.Namespace) -> Callable[[], float]:
    """The same by ``Engine.train_step``."""
    engine = Engine(config, make_topology(arguments.device))
    return timed(lambda: engine.train_step([batch], config.optimizer.lr), arguments)


def main() -> None:
    """Print a table; the switches' own worth first, then the engine's price under each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("vocabulary", 8192), ("length", 256), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    parser.add_argument("--stages", nargs="+", type=int, choices=(0, 1, 2), default=[1])
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    initialize_process_group(make_topology(arguments.device))
    first = make_config(arguments, {}, 0)
    batch = random_batch(first)
    shape = f"D {arguments.width}, L {arguments.layers}, V {arguments.vocabulary}, T {arguments.length}"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s)")
    print(f"{shape}, B {arguments.batch}, {arguments.precision}, {CLOCK} clock; load {os.getloadavg()[0]:.1f}")
    print(HEADER, flush=True)
    baseline = plain_step(first, batch, arguments)
    for row in arguments.rows:
        switches = SWITCHES[row]
        own = plain_step(make_config(arguments, switches, 0), batch, arguments)
        name = f"loop: {row}" if switches else "loop: A/A"
        show(measure(baseline, {name: own}, arguments.pairs))
        engines = {
            f"engine: {row}, ZeRO {stage}": engine_step(make_config(arguments, switches, stage), batch, arguments)
            for stage in arguments.stages
        }
        show(measure(own, engines, arguments.pairs))


def show(series: dict[str, tuple[list[float], list[float]]]) -> None:
    """A printed line each."""
    for name, values in series.items():
        print(ratio(name, *values).row(), flush=True)


if __name__ == "__main__":
    main()
