"""Parts of a step alone, forward and backward, over the form that they took the place of.

    python benchmarks/kernels.py                       # CPU, small shapes
    python benchmarks/kernels.py --device cuda

head: the output product over logical rows of the table (50258 on a GPU), and over all padded ones.
loss: logits and cross-entropy, fused as written, fused and compiled.
attention, causal: torch's, and flash-attn's where it is installed.
documents: under a boolean mask T × T, and by the bounds of documents.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import HEADER, measure, ratio, seconds
from torch import Tensor

from megameta.engine.compile import compile_loss, missing_compiler
from megameta.model import cross_entropy_sum
from megameta.model.attention import (
    FLASH,
    Documents,
    Mask,
    attend_flash,
    attend_sdpa,
    find_flash,
    find_runs,
    has_varlen,
    load_flash,
)
from megameta.model.gpt import make_logits
from megameta.parallel.losses import fused_cross_entropy_sum

#: Rows, width and entries of the head; length of the causal case, lengths with documents; heads.
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"head": (256, 64, 500), "length": 128, "documents": (256,), "heads": 2},
    "cuda": {"head": (16 * 1024, 768, 50258), "length": 1024, "documents": (4096, 32768), "heads": 12},
}
#: No mask of more bytes is made.
MOST_BYTES = 2**31
Sides = dict[str, Callable[[], Tensor]]


class Kernels:
    """The cases of one device. Each gives sides by name, the first of which the others are compared with."""

    def __init__(self, device: str) -> None:
        self.device, self.shape = device, SHAPES[device]
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.leaves: list[Tensor] = []

    def leaf(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers that want a gradient."""
        made = (scale * torch.randn(*shape, device=self.device, dtype=dtype or torch.float32)).requires_grad_()
        self.leaves.append(made)
        return made

    def head(self) -> Sides:
        """Output products, without a loss."""
        rows, width, entries = self.shape["head"]
        x_BTD = self.leaf(1, rows, width)
        weight_PD = self.leaf(entries + -entries % 128, width, scale=0.02)
        return {
            name: partial(lambda padded: make_logits(x_BTD, weight_PD, entries, padded=padded).sum(), padded)
            for name, padded in (("head, logical rows", False), ("head, padded rows", True))
        }

    def loss(self) -> Sides:
        """Head and loss."""
        rows, width, entries = self.shape["head"]
        x_BTD = self.leaf(1, rows, width)
        weight_PD = self.leaf(entries + -entries % 128, width, scale=0.02)
        label_BT = torch.randint(0, entries, (1, rows), device=self.device)
        padded = self.device == "cuda"

        def fused(compiled: Callable[..., Any] | None) -> Tensor:
            return fused_cross_entropy_sum(x_BTD, weight_PD[:entries], label_BT, compiled=compiled)

        sides: Sides = {
            "loss, logits": lambda: cross_entropy_sum(make_logits(x_BTD, weight_PD, entries, padded=padded), label_BT),
            "loss, fused": partial(fused, None),
        }
        if missing_compiler(self.device) is None and padded:
            sides["loss, fused and compiled"] = partial(fused, compile_loss())
        return sides

    def causal(self) -> Sides:
        """Attention of a micro-batch of 16 sequences."""
        q, k, v = self._rows(16, self.shape["length"])
        sides: Sides = {"attention, torch's": lambda: attend_sdpa(q, k, v, Mask()).sum()}
        if self.device == "cuda" and (module := find_flash()) is not None:
            sides[f"attention, {FLASH[module]}"] = lambda: attend_flash(load_flash(module), q, k, v, Mask()).sum()
        return sides

    def documents(self, length: int) -> Sides:
        """Attention within documents of some hundreds of rows, 32 k rows in all."""
        batch = max(1, (32768 if self.device == "cuda" else 256) // length)
        q, k, v = self._rows(batch, length)
        document_BT = (torch.rand(batch, length, device=self.device) < 0.002).cumsum(dim=1)
        known = find_runs(document_BT)
        varlen = self.device == "cuda" and has_varlen()
        by_bounds = Mask(documents=Documents(document_BT, known, has_varlen=varlen))
        sides: Sides = {f"T {length}, by bounds": lambda: attend_sdpa(q, k, v, by_bounds).sum()}
        if batch * length**2 <= MOST_BYTES:
            allowed_BTS = Documents(document_BT).allowed_BTS
            sides[f"T {length}, by a mask"] = lambda: attend_sdpa(q, k, v, Mask(explicit_BTS=allowed_BTS)).sum()
        if self.device == "cuda" and (module := find_flash()) is not None:
            sides[f"T {length}, {FLASH[module]}"] = lambda: attend_flash(load_flash(module), q, k, v, by_bounds).sum()
        return sides

    def _rows(self, batch: int, length: int) -> list[Tensor]:
        heads = self.shape["heads"]
        return [self.leaf(batch, heads, length, 64, dtype=self.dtype) for _ in range(3)]

    def timed(self, side: Callable[[], Tensor]) -> float:
        """Seconds of a forward and a backward pass."""
        for leaf in self.leaves:
            leaf.grad = None
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = seconds()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            out = side()
        out.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return seconds() - start


def main() -> None:
    """Print the ratios of each case to its first side; a case that fails is named, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    kernels = Kernels(arguments.device)
    cases: dict[str, Callable[[], Sides]] = {"head": kernels.head, "loss": kernels.loss, "attention": kernels.causal}
    for length in kernels.shape["documents"]:
        cases[f"documents, T {length}"] = partial(kernels.documents, length)
    print(f"torch {torch.__version__}, {arguments.device}, {kernels.shape}")
    print(HEADER)
    record: dict[str, Any] = {"command": sys.argv, "torch": torch.__version__, "rows": [], "errors": {}}
    for case, make in cases.items():
        kernels.leaves.clear()
        try:
            first, *others = ((name, partial(kernels.timed, side)) for name, side in make().items())
            found = measure(first[1], dict(others) or {f"A/A: {first[0]}": first[1]}, arguments.pairs)
            rows = [ratio(name, *values) for name, values in found.items()]
            record["rows"] += [{"over": first[0], **vars(row)} for row in rows]
            for row in rows:
                print(f"{row.row()}  over {first[0]}", flush=True)
        except Exception as error:
            record["errors"][case] = f"{type(error).__name__}: {error}"
            print(f"{case}: {record['errors'][case].splitlines()[0]}", flush=True)
        if arguments.json:  # at once, for what comes before a time limit
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(record["errors"]))


if __name__ == "__main__":
    main()
