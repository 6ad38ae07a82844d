"""What a GPU would be asked to do, on a machine without one: kernels, bytes kept for the backward pass, host waits.

A CUDA device that computes nothing (``fake_cuda.cpp``) under torch's FakeTensorMode: shapes, dtypes, autocast, autograd
and torch.compile's tracing are the real ones, values do not exist. So an operation whose result the host would wait
for is an error here, and so is one with operands on two devices.

The device stays for the rest of a process and must be there before torch is imported: this module is run as a program.

    python -m tests.support.dry_cuda              the roofline of docs/performance.md
    … dry_cuda LIBRARY cases.json > found.json    what tests/model/test_cuda_dry.py compares

What this cannot show: times (the roofline is an estimate from bytes and operations), the arithmetic of CUDA kernels,
memory of their workspaces and of the allocator, what inductor fuses, NCCL, DeepSpeed's own code.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
#: Of an H100 or H200 as figures that users report have it, not its data sheet: bytes a second; operations a second of
#: products in bf16, in float32, and of attention; seconds that the shortest kernel takes.
BANDWIDTH, PRODUCTS, PRODUCTS_FLOAT32, ATTENTION, SHORTEST = 2.9e12, 700e12, 45e12, 350e12, 2.5e-6


def build(folder: Path) -> Path:
    """Compile the device: five seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder, library = Path(spec.origin).parent, folder / "fake_cuda.so"
    include = torch_folder / "include"
    command = [os.environ.get("CXX", "g++"), "-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(library)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{sysconfig.get_path('include')}"]
    command += [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return library


def load(library: Path) -> None:
    """Make the device known. Not twice, and not in a process that has imported torch."""
    assert "torch" not in sys.modules
    loader = importlib.machinery.ExtensionFileLoader("fake_cuda", str(library))
    spec = importlib.util.spec_from_loader("fake_cuda", loader)
    assert spec is not None
    loader.exec_module(importlib.util.module_from_spec(spec))
    import torch
    import torch.nn.functional as F

    # What torch asks its CUDA build, which this is not.
    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment]
    torch.accelerator.is_available = lambda: False  # type: ignore[assignment]

    def attention(
        q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, enable_gqa: bool = False
    ) -> Any:
        """What scaled_dot_product_attention picks on such a GPU."""
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        bias = torch.zeros((), dtype=q.dtype, device=q.device).where(attn_mask, float("-inf")).to(q.dtype)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False)[0]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


def tensors(value: Any) -> list[Any]:
    """All of an argument or a result."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors(item)] if isinstance(value, (list, tuple)) else []


def touched(x: Any) -> int:
    """Bytes of a tensor's memory that are read or written; expanded dimensions once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def make_recorder() -> Any:
    """A dispatch mode that counts kernels and estimates their time."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    free = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
    free |= {"detach", "alias", "lift_fresh"}

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.kernels, self.seconds, self.copies = 0, 0.0, []
            self.products = 0.0
            """Of the seconds, those of matrix products and attention."""
            self.names: set[str] = set()
            """Of the operations."""

        def numbers(self) -> dict[str, Any]:
            """What was seen so far, for JSON."""
            found = {"kernels": self.kernels, "seconds": self.seconds, "copies": self.copies}
            return {**found, "names": sorted(self.names)}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            name, read = func._schema.name.split("::")[-1], tensors(args) + tensors(kwargs)
            if {x.device.type for x in read if x.dim()} == {"cpu", "cuda"} or (
                name == "_to_copy" and kwargs.get("device") is not None and read[0].device != kwargs["device"]
            ):
                self.copies.append(name)
            written = tensors(out)
            if func.is_view or func.namespace == "prim" or name in free or not any(x.is_cuda for x in read + written):
                return out
            size = sum(touched(x) for x in read + written)
            if name in ("index_select", "embedding"):
                size = 2 * sum(touched(x) for x in written)
            elif name == "index_add_":
                size = 3 * touched(args[3])
            packet, flops, rate = func._overloadpacket, 0.0, PRODUCTS
            if packet in flop_registry:
                operands = args[:3] if name == "addmm" else args  # and not in what dtype the result is
                flops = flop_registry[packet](*operands, **kwargs, out_val=out)
            if "attn" in name or "attention" in name:
                flops, rate = flops / 2, ATTENTION  # the registry counts what a causal mask hides
            elif read and read[1 if name == "addmm" else 0].dtype == torch.float32:
                rate = PRODUCTS_FLOAT32
            self.kernels += 1
            self.names.add(name)
            seconds = max(size / BANDWIDTH, flops / rate, SHORTEST)
            self.seconds += seconds
            self.products += seconds if flops else 0.0
            return out

    return Recorder()


def run(model: dict[str, Any], batch: int, *, documents: bool, compiled: bool = False) -> dict[str, Any]:
    """One forward and backward pass under bf16 autocast, of a batch as the loader would give it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megameta.model import GPT, Block, ModelConfig, cross_entropy_sum, find_document_runs

    config = ModelConfig(**model)
    length = config.max_position_embeddings
    columns = length // 10
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(0, 100, (batch, length), generator=generator)
    token_BT[:, torch.randperm(length, generator=generator)[:columns]] = config.meta_token_id
    document_BT = (torch.rand((batch, length), generator=generator) < 0.005).cumsum(dim=1)
    runs = find_document_runs(token_BT, document_BT, config.meta_token_id, columns)
    kept: dict[int, Any] = {}
    graphs = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[id(storage)] = storage
        return x

    def backend(module: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module

    with FakeTensorMode(allow_non_fake_inputs=True):

        def there(x: torch.Tensor) -> torch.Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device="cuda")

        with torch.device("cuda"):
            gpt = GPT(config)
        if compiled:  # which a recorder would keep from compiling
            torch._dynamo.reset()
            forward = torch.compile(Block.forward, dynamic=False, backend=backend, fullgraph=True)
            for block in gpt.blocks:
                block.forward = forward.__get__(block)
        given: dict[str, Any] = {"num_meta_columns": columns}
        if documents:
            given |= {"document_BT": there(document_BT), "document_runs": runs.with_each(there)}
        token_BT = there(token_BT)
        seen = make_recorder()
        with contextlib.nullcontext() if compiled else seen:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with torch.autocast("cuda", torch.bfloat16), contextlib.nullcontext() if compiled else hooks:
                loss = cross_entropy_sum(gpt(token_BT, **given), token_BT)
            torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True)
        own = {id(p.untyped_storage()) for p in gpt.parameters()}
        kept_bytes = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    return {**seen.numbers(), "products": seen.products, "kept": kept_bytes, "graphs": graphs}


def measure(model: dict[str, Any], batch: int, *, documents: bool) -> dict[str, Any]:
    """Of a layer, kernels and bytes kept: what three layers have more than two. Of all of the model's, seconds."""
    two, three = (run({**model, "num_layers": n}, batch, documents=documents) for n in (2, 3))
    layer = {key: three[key] - two[key] for key in ("kernels", "kept", "seconds", "products")}
    seconds = two["seconds"] + (model["num_layers"] - 2) * layer["seconds"]
    share = layer["products"] / layer["seconds"]
    return {**layer, "seconds": seconds, "products": share, "copies": three["copies"], "names": three["names"]}


def run_loss(kind: str, rows: int, width: int, entries: int) -> dict[str, Any]:
    """Head and loss, forward and backward, as ``run``: of "logits", "fused", or "compiled", where each pass that
    torch.compile makes of a chunk's logits is taken for one kernel."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megameta.model import cross_entropy_sum
    from megameta.model.gpt import make_logits
    from megameta.parallel.losses import fused_cross_entropy_sum, loss_and_gradient

    with FakeTensorMode(allow_non_fake_inputs=True):
        seen = make_recorder()

        def compiled(logits_CP: Any, label_C: Any, entries: int) -> Any:
            with torch.utils._python_dispatch._disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
                found = loss_and_gradient(logits_CP, label_C, entries)
            seen.kernels += 2
            seen.seconds += 3 * logits_CP.nbytes / BANDWIDTH
            return found

        x_BTD = torch.empty(1, rows, width, device="cuda", requires_grad=True)
        weight_PD = torch.empty(entries + -entries % 128, width, device="cuda", requires_grad=True)
        label_BT = torch.empty(1, rows, dtype=torch.int64, device="cuda")
        with seen, torch.autocast("cuda", torch.bfloat16):
            if kind == "logits":
                loss = cross_entropy_sum(make_logits(x_BTD, weight_PD, entries, padded=True), label_BT)
            else:
                how = compiled if kind == "compiled" else None
                loss = fused_cross_entropy_sum(x_BTD, weight_PD[:entries], label_BT, compiled=how)
            torch.autograd.grad(loss, [x_BTD, weight_PD])
    return seen.numbers()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """As ``measure``, and the graphs of three layers; or as ``run_loss``. ``error``: of what a pass would have waited
    for, or mixed up."""
    try:
        if "loss" in case:
            return {"error": None, **run_loss(case["loss"], *case["shape"])}
        traced = run({**case["model"], "num_layers": 3}, case["batch"], documents=case["documents"], compiled=True)
        return {"error": None, **measure(**case), "graphs": traced["graphs"]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


LOSSES = ("logits", "fused", "compiled")
SIZES = {
    "152 M": ({"hidden_size": 768, "num_layers": 12, "num_heads": 12, "max_position_embeddings": 1024}, 16),
    "1.3 B": ({"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "max_position_embeddings": 1024}, 8),
}


def main() -> None:
    """See the module's docstring."""
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]))
        cases = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        json.dump({name: run_case(case) for name, case in cases.items()}, sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        load(build(Path(folder)))
        for size, (model, batch) in SIZES.items():
            none, branch = (measure({**model, "meta_attention": has}, batch, documents=False) for has in (False, True))
            print(
                f"{size}: without {none['seconds'] * 1e3:.1f} ms, with {branch['seconds'] * 1e3:.1f} ms, branch over"
                f" none {branch['seconds'] / none['seconds']:.3f}; {branch['products']:.0%} of a layer are products"
            )
            rows = batch * model["max_position_embeddings"]
            losses = {kind: run_loss(kind, rows, model["hidden_size"], 50258) for kind in LOSSES}
            print(*(f"  {kind}: {1e3 * x['seconds']:.1f} ms" for kind, x in losses.items()))


if __name__ == "__main__":
    main()
