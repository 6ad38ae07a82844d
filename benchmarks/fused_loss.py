"""The fused loss over logits and cross-entropy, forward and backward: with torch's code, and with ours.

    BENCHMARK_CLOCK=cpu OMP_NUM_THREADS=1 python benchmarks/fused_loss.py
    OMP_NUM_THREADS=1 python benchmarks/fused_loss.py --precision bf16 --pairs 5

Random hidden states; one row in ten has no target.
"""

import argparse
import os
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from paired import CLOCK, HEADER, measure, ratio, seconds
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX
from megameta.model import cross_entropy_sum
from megameta.parallel import losses as fused_loss
from megameta.parallel.losses import chunk_rows, fused_cross_entropy_sum


def with_our_code(x_BTD: Tensor, weight_VD: Tensor, label_BT: Tensor) -> Tensor:
    """As on a GPU, and as where the vocabulary is spread over ranks."""
    with mock.patch.object(fused_loss, "is_torchs", lambda device_type, ranks: False):
        return fused_cross_entropy_sum(x_BTD, weight_VD, label_BT)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("vocabulary", 8192), ("rows", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x_BTD = torch.randn(1, arguments.rows, arguments.width, requires_grad=True)
    weight_VD = (0.02 * torch.randn(arguments.vocabulary, arguments.width)).requires_grad_()
    label_BT = torch.randint(0, arguments.vocabulary, (1, arguments.rows))
    label_BT[:, ::10] = IGNORE_INDEX

    def timed(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
        def run() -> float:
            x_BTD.grad = weight_VD.grad = None
            start = seconds()
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
                loss_sum = loss(x_BTD, weight_VD, label_BT)
            loss_sum.backward()
            return seconds() - start

        return run

    def logits(x: Tensor, weight: Tensor, label: Tensor) -> Tensor:
        return cross_entropy_sum(F.linear(x, weight), label)

    candidates = {
        "A/A": timed(logits),
        "fused, as a run has it": timed(fused_cross_entropy_sum),
        "fused, our code": timed(with_our_code),
    }
    chunk = chunk_rows(arguments.rows, arguments.width, arguments.vocabulary, "cpu")
    shape = f"R {arguments.rows}, D {arguments.width}, V {arguments.vocabulary}, chunks of {chunk} rows"
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {arguments.precision}, {shape}, {CLOCK} clock"
    )
    print(f"load {os.getloadavg()[0]:.1f}")
    print(HEADER)
    for name, values in measure(timed(logits), candidates, arguments.pairs).items():
        print(ratio(name, *values).row(), flush=True)


if __name__ == "__main__":
    main()
