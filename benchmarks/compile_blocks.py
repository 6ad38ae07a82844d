"""Seconds of compiled blocks over those of blocks as written: forward and backward, without head, loss and optimiser.

    OMP_NUM_THREADS=1 python benchmarks/compile_blocks.py
    OMP_NUM_THREADS=2 python benchmarks/compile_blocks.py --width 768 --layers 12 --length 1024 --batch 1 --pairs 8

Random tokens, a tenth of them meta-tokens. What compiling itself takes is the first pass's time beyond the others'.
"""

import argparse
import os
from collections.abc import Callable

import torch
from paired import CLOCK, HEADER, measure, ratio, seconds

from megameta.engine.compile import compile_blocks
from megameta.model import GPT, ModelConfig, initialize_weights, make_context


def main() -> None:
    """Print the ratio, the seconds of a pass, and those of the first compiled one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("length", 256), ("batch", 8), ("pairs", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    shape, columns = (arguments.batch, arguments.length), arguments.length // 10
    config = ModelConfig(
        hidden_size=arguments.width,
        num_layers=arguments.layers,
        num_heads=max(1, arguments.width // 64),
        vocab_size=512,
        meta_token_id=511,
        max_position_embeddings=arguments.length,
    )
    torch.manual_seed(0)
    token_BT = torch.randint(0, 511, shape)
    token_BT[:, torch.randperm(arguments.length)[:columns]] = config.meta_token_id

    def timed(model: GPT) -> Callable[[], float]:
        def run() -> float:
            start = seconds()
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
                x_BTD = model.hidden_states(token_BT, make_context(config, token_BT, num_meta_columns=columns))
            x_BTD.sum().backward()
            model.zero_grad()
            return seconds() - start

        return run

    models = {name: GPT(config) for name in ("as written", "A/A", "compiled")}
    for model in models.values():
        initialize_weights(model, config, seed=0)
    compile_blocks(models["compiled"], "cpu")
    passes = {name: timed(model) for name, model in models.items()}
    first = passes["compiled"]()
    base = passes.pop("as written")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {arguments.precision}, {CLOCK} clock")
    print(f"D {arguments.width}, L {arguments.layers}, T {arguments.length}, B {arguments.batch}; ", end="")
    print(f"the first compiled pass: {first:.1f} s; load {os.getloadavg()[0]:.1f}")
    print(HEADER)
    for name, values in measure(base, passes, arguments.pairs).items():
        print(ratio(name, *values).row(), flush=True)


if __name__ == "__main__":
    main()
