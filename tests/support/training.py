"""A tiny corpus, tiny configurations, and an oracle of training: a plain torch loop in one process, no DeepSpeed."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megameta.config import RunConfig, build_config, settle
from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.loader import StepLoader
from megameta.data.samples import Corpus, SampleIndex
from megameta.engine.build import build_model
from megameta.engine.engine import Engine, StepResult
from megameta.parallel.topology import Topology
from megameta.train.schedule import learning_rate

VOCABULARY, META = 61, 60


def write_corpus(
    prefix: Path, *, tokens: int = 4000, seed: int = 0, odd_token: int | None = None, vocabulary: int = META
) -> str:
    """Documents whose token t + 1 mostly follows from token t. Half of the text is in documents of one or two tokens,
    so that under a document mask some samples have few targets and others many. With ``odd_token`` the last token is
    that one and all others are below 50."""
    draw = np.random.default_rng(seed)
    written = 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while written < tokens:
            tiny = written < tokens // 2
            length = int(draw.integers(1, 3)) if tiny else int(draw.integers(100, 300))
            document = np.empty(length, dtype=np.int64)
            document[0] = draw.integers(0, vocabulary)
            for t in range(1, length):
                document[t] = (
                    (document[t - 1] * 7 + 3) % vocabulary if draw.random() < 0.8 else draw.integers(0, vocabulary)
                )
            if odd_token is not None:
                document %= 50
                document[-1] = odd_token if written + length >= tokens else 0
            writer.add_document(document)
            written += length
    return str(prefix)


def tiny_values(train: str, **changes) -> dict:
    """Plain values of a configuration; ``changes`` are section__key."""
    values = {
        "run": {"seed": 7, "device": "cpu"},
        "model": {
            "vocab_size": VOCABULARY,
            "meta_token_id": META,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "bias": True,
            "initializer_range": 0.1,
            "max_position_embeddings": 32,
        },
        "data": {
            "train": train,
            "sequence_length": 32,
            "meta_token_fraction": 0.125,
            "document_mask": True,
            "reset_positions": True,
        },
        "train": {"num_steps": 12, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 3, "clip_grad_norm": 0.5},
        "log": {"tensorboard": False},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def tiny_config(train: str, **changes) -> RunConfig:
    """Of a run on the CPU, settled."""
    return settle(build_config(tiny_values(train, **changes)), "cpu")


def training_set(config: RunConfig) -> Dataset:
    index = SampleIndex(Corpus(config.data.train), config.data.text_per_sample, config.run.seed)
    return Dataset(index, SampleFormat.of(config.data, config.model.meta_token_id, config.run.seed))


def step_loader(config: RunConfig, topology: Topology) -> StepLoader:
    """This rank's micro-batches of the training set."""
    return StepLoader(
        training_set(config),
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        data_parallel_size=topology.data_parallel_size,
        data_parallel_rank=topology.data_parallel_rank,
    )


def take_steps(engine: Engine, loader: StepLoader, config: RunConfig, first: int, last: int) -> list[StepResult]:
    """Optimiser steps first … last, counted from 1, at the rates of the configuration's schedule."""
    results = []
    for step in range(first, last + 1):
        batches = loader.read(step - 1, step)
        results.append(engine.train_step(batches, learning_rate(step, config.train.num_steps, config.optimizer)))
    return results


def weights_digest(engine: Engine) -> str:
    """Of every parameter in full, as this rank sees it."""
    digest = hashlib.sha256()
    for name in engine.state.parameters:
        digest.update(engine.state.local(name).float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def oracle_lr(step: int, config: RunConfig) -> float:
    """Warm-up and cosine, from the words of the specification."""
    o, last = config.optimizer, config.train.num_steps
    if step <= o.warmup_steps:
        return o.lr * step / o.warmup_steps
    x = (step - o.warmup_steps) / (last - o.warmup_steps)
    return o.min_lr + (o.lr - o.min_lr) * (1 + math.cos(math.pi * x)) / 2


def oracle_run(config: RunConfig, steps: int, dtype: torch.dtype = torch.float64) -> dict:
    """Losses, unclipped norms, numbers of targets, first gradients and last weights; one sample at a time."""
    model = build_model(config).to(dtype)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    spared = [p for p in model.parameters() if p.dim() == 1]
    o = config.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=o.betas, eps=o.eps, fused=False, foreach=False)
    dataset, size = training_set(config), config.train.global_batch_size
    out: dict = {"losses": [], "norms": [], "targets": []}
    for step in range(1, steps + 1):
        samples = [dataset[i] for i in range((step - 1) * size, step * size)]
        targets = sum(int((s.label_T != -100).sum()) for s in samples)
        total = torch.zeros((), dtype=dtype)
        for s in samples:
            token, label, document, position = (
                None if x is None else torch.from_numpy(x)[None]
                for x in (s.token_T, s.label_T, s.document_T, s.position_T)
            )
            logits = model(token, document_BT=document, position_BT=position)
            total = total + F.cross_entropy(logits[0], label[0], ignore_index=-100, reduction="sum")
        loss = total / targets
        adamw.zero_grad()
        loss.backward()
        if step == 1:
            out["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad.mul_(min(1.0, o.clip_grad_norm / norm))
        for group in adamw.param_groups:
            group["lr"] = oracle_lr(step, config)
        adamw.step()
        out["losses"].append(float(loss.detach()))
        out["norms"].append(norm)
        out["targets"].append(targets)
    out["weights"] = {name: p.detach() for name, p in model.named_parameters()}
    return out


def full_state(engine) -> tuple[dict, dict]:
    """(weights, moments) of an engine in full, on every rank: collective."""
    mine = [(e.kind, e.name, t) for e in engine.state.entries if (t := engine.state.gather(e)) is not None]
    everyone = [None] * engine.topology.world_size
    dist.all_gather_object(everyone, mine)
    found = {kind: {n: t for part in everyone for k, n, t in part if k == kind} for kind in ("model", "optimizer")}
    names = [n for n in engine.state.shapes if n in found["model"]]  # in the model's order
    return {n: found["model"][n] for n in names}, found["optimizer"]
