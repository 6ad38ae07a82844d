"""Where the time of a training step goes, by part of the model and of the engine.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --steps 5

Hooks on modules switch a stop-watch from part to part, so that each second counts to the innermost one, forward and
backward. It counts this process's seconds on the CPU: whatever else runs on the machine does not show. The hooks cost
a few microseconds each. A micro-batch of random text; the engine is DeepSpeed's at ZeRO 1.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from engine_overhead import make_config, random_batch

from megameta.cluster.launch import initialize_process_group, make_topology
from megameta.engine.engine import Engine

#: Module path in the model → part. A module that is not named counts to the one around it.
PARTS = {
    r"embedding": "embedding",
    r"blocks\.\d+": "residual adds, gather and scatter",
    r"blocks\.\d+\.norm_\w+": "norms",
    r"blocks\.\d+\.attention": "causal attention: rotation, kernel",
    r"blocks\.\d+\.attention\.[qkvo]_proj": "causal attention: projections",
    r"blocks\.\d+\.meta_attention": "meta branch: rotation, kernel",
    r"blocks\.\d+\.meta_attention\.[qkvo]_proj": "meta branch: projections",
    r"blocks\.\d+\.mlp": "MLP: activation",
    r"blocks\.\d+\.mlp\.\w+_proj": "MLP: projections",
    r"head": "head and loss",
}
ENGINE = "engine: all else"


class StopWatch:
    """Seconds by part; a part that begins inside another one stops it meanwhile."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.backward = False
        self._open: list[str] = []
        self._since = 0.0

    def _take(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]][self.backward] += now - self._since
        self._since = now

    def begin(self, part: str) -> None:
        """Count to ``part`` from now on."""
        self._take()
        self._open.append(part)

    def end(self, part: str) -> None:
        """Count to what was open before it."""
        self._take()
        while self._open and self._open.pop() != part:
            pass

    def around(self, part: str, function: Callable, *, backward: bool = False) -> Callable:
        """The function, counted to a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            before, self.backward = self.backward, backward
            try:
                return function(*args, **kwargs)
            finally:
                self.end(part)
                self.backward = before

        return run


def hook_modules(model: torch.nn.Module, watch: StopWatch) -> None:
    """Begin and end the parts of modules, in both passes."""

    def change(action: Callable[[str], None], part: str, *_: Any) -> None:
        action(part)

    for path, module in model.named_modules():
        part = next((part for pattern, part in PARTS.items() if re.fullmatch(pattern, path)), None)
        if part is None:
            continue
        begin, end = partial(change, watch.begin, part), partial(change, watch.end, part)
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
        module.register_full_backward_pre_hook(begin)
        module.register_full_backward_hook(end)


def hook_engine(engine: Engine, watch: StopWatch) -> None:
    """The loss, the backward pass, and what comes after it."""
    module, inner = engine.engine.module, engine.optimizer
    module.cross_entropy = watch.around("head and loss", module.cross_entropy)
    engine.engine.backward = watch.around("backward: between modules", engine.engine.backward, backward=True)
    engine._update = watch.around("engine: norm, clipping, copies", engine._update)
    inner.step = watch.around("AdamW", inner.step)


def main() -> None:
    """Print the table, largest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("vocabulary", 8192), ("length", 1024), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--fused-loss", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    arguments.device = "cpu"
    initialize_process_group(make_topology("cpu"))
    config = make_config(arguments, {"fused_loss": arguments.fused_loss, "compile": "none"}, 1)
    engine, batch, watch = Engine(config, make_topology("cpu")), random_batch(config), StopWatch()
    hook_modules(engine.model, watch)
    hook_engine(engine, watch)
    step = watch.around(ENGINE, engine.train_step)
    step([batch], 1e-4)
    watch.seconds.clear()
    for _ in range(arguments.steps):
        step([batch], 1e-4)
    show(watch, arguments)


def show(watch: StopWatch, arguments: argparse.Namespace) -> None:
    """Parts, milliseconds a step in both passes, shares."""
    whole = sum(map(sum, watch.seconds.values()))
    shape = f"D {arguments.width}, L {arguments.layers}, V {arguments.vocabulary}, T {arguments.length}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {shape}, B {arguments.batch}")
    print(f"{arguments.precision}, fused loss: {arguments.fused_loss}; {1e3 * whole / arguments.steps:.0f} ms a step")
    print(f"{'part':<38} {'forward':>9} {'backward':>9} {'share':>7}")
    for part, seconds in sorted(watch.seconds.items(), key=lambda item: -sum(item[1])):
        forward, backward = (1e3 * value / arguments.steps for value in seconds)
        print(f"{part:<38} {forward:9.2f} {backward:9.2f} {100 * sum(seconds) / whole:6.1f} %")


if __name__ == "__main__":
    main()
