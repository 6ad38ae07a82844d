"""One side of ``peers.py``, in a process of its own: trains on command, so that the sides can take turns.

    python benchmarks/peer_sides.py SIDE SETTINGS.json REPLIES

Each side trains in its own loop: ours reads its own data and calls the engine; nanoGPT's train.py runs as it stands,
and waits where it prints an iteration; HuggingFace's Trainer waits in a callback. A line "N" on standard input lets N
steps run; the answer, a JSON line on file descriptor REPLIES, holds their seconds. The first step runs unasked.
"""

import builtins
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import seconds


class Gate:
    """Where a loop waits for its turn."""

    def __init__(self, replies: int, device: str) -> None:
        self._replies, self._cuda = os.fdopen(replies, "w"), device == "cuda"
        self._asked = self._left = 1
        self._start = seconds()

    def pass_step(self, loss: float | None = None) -> None:
        """A step has ended. Returns when the next may begin; raises EOFError when there is to be none."""
        self._left -= 1
        if self._left:
            return
        if self._cuda:
            torch.cuda.synchronize()
        answer: dict[str, Any] = {"seconds": seconds() - self._start, "steps": self._asked, "loss": loss}
        peak = torch.cuda.max_memory_allocated() if self._cuda else peak_resident()
        self._replies.write(json.dumps(answer | {"peak_bytes": peak}) + "\n")
        self._replies.flush()
        line = sys.stdin.readline()
        if not line.strip():
            raise EOFError
        self._asked = self._left = int(line)
        self._start = seconds()


def peak_resident() -> int:
    """Bytes. (getrusage's ru_maxrss begins with that of the process that launched this one.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


def ours(settings: dict[str, Any], gate: Gate) -> None:
    """The engine under DeepSpeed, with the loader of a run."""
    from megameta.cluster.launch import initialize_process_group, make_topology
    from megameta.engine.pipeline_engine import make_engine
    from megameta.train.data import PretrainingData
    from megameta.train.run_config import load_run_config

    config = load_run_config(settings["config"], settings["overrides"])
    topology = make_topology(settings["device"])
    initialize_process_group(topology)
    loader, engine = PretrainingData(config, topology).loader(), make_engine(config, topology)
    for number in range(config.train.num_steps):
        result = engine.train_step(loader.read(number, number + 1), 1e-4)
        gate.pass_step(result.loss)


def nanogpt(settings: dict[str, Any], gate: Gate) -> None:
    """nanoGPT's own train.py. It prints an iteration when it has read the loss, so that the device is idle."""
    show = builtins.print

    def waiting(*values: Any, **options: Any) -> None:
        show(*values, **options)
        if found := re.match(r"iter \d+: loss ([\d.]+|nan)", str(values[0]) if values else ""):
            gate.pass_step(float(found.group(1)))

    builtins.print = waiting
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)  # it would take them for a distributed run
    shape = settings["shape"]
    chosen = {
        "dataset": settings["data"],  # a folder with train.bin and val.bin
        "out_dir": settings["folder"],
        "device": settings["device"],
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings["precision"]],
        "compile": settings["compile"],
        "batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["accumulation_steps"],
        "block_size": shape["length"],
        "n_layer": shape["num_layers"],
        "n_head": shape["num_heads"],
        "n_embd": shape["hidden_size"],
        "bias": True,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "always_save_checkpoint": False,
    }
    os.chdir(settings["nanogpt"])
    sys.path.insert(0, settings["nanogpt"])
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in chosen.items())]
    runpy.run_path("train.py", run_name="__main__")


class Windows(torch.utils.data.Dataset):
    """Random windows of a file of uint16 tokens."""

    def __init__(self, path: Path, length: int, count: int) -> None:
        self._tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self._starts = np.random.default_rng(1).integers(0, len(self._tokens) - length, count)
        self._length = length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self._starts[index]
        window = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        return {"input_ids": window, "labels": window}


def hf(settings: dict[str, Any], gate: Gate) -> None:
    """HuggingFace's Trainer with DeepSpeed, on GPT2LMHeadModel. Losses are logged as seldom as by default."""
    os.environ["DS_ACCELERATOR"] = settings["device"]
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Waiting(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.pass_step()

    shape, is_bf16 = settings["shape"], settings["precision"] == "bf16"
    model = GPT2LMHeadModel(gpt2_config(GPT2Config, shape))
    deepspeed = {
        "zero_optimization": {"stage": settings["zero_stage"]},
        "bf16": {"enabled": is_bf16},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    arguments = TrainingArguments(
        output_dir=settings["folder"],
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["accumulation_steps"],
        max_steps=10**6,
        learning_rate=1e-4,
        weight_decay=0.1,
        optim="adamw_torch_fused",
        bf16=is_bf16,
        use_cpu=settings["device"] == "cpu",
        deepspeed=deepspeed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    batch = settings["micro_batch_size"] * settings["accumulation_steps"]
    data = Windows(Path(settings["data"], "train.bin"), shape["length"], 2000 * batch)
    Trainer(model, arguments, train_dataset=data, callbacks=[Waiting()]).train()


def gpt2_config(kind: Callable[..., Any], shape: dict[str, int]) -> Any:
    """GPT2Config of the shape: exact GELU and no dropout, as on the other sides."""
    return kind(
        vocab_size=shape["vocab_size"],
        n_positions=shape["length"],
        n_embd=shape["hidden_size"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


SIDES = {"ours": ours, "nanogpt": nanogpt, "hf": hf}


def main() -> None:
    """Train until standard input ends."""
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    try:
        SIDES[sys.argv[1]](settings, Gate(int(sys.argv[3]), settings["device"]))
    except EOFError:
        os._exit(0)  # process groups and compilers of many kinds would be torn down for nothing


if __name__ == "__main__":
    main()
