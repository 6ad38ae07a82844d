"""Processes that train on command, so that sides which cannot share a process can take turns (``peer_sides.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megameta.cluster.launch import free_port
from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.model import ModelConfig

#: A process group of one.
ALONE = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


class Side:
    """One of them, launched. ``settings`` are those of ``peer_sides.py``. ``wait`` for its first step before the rest.

    Args:
        kind: of ``peer_sides.SIDES``.
        name: for people.
        steps: optimiser steps of a turn.
        root: a directory, in which it gets one of its own.
    """

    def __init__(self, kind: str, name: str, steps: int, settings: dict[str, Any], root: Path) -> None:
        self.name, self._steps = name, steps
        self.last: dict[str, Any] = {}
        """The last answer: seconds, loss (where the loop tells it), peak_bytes."""
        folder = root / "".join(letter if letter.isalnum() else "_" for letter in name)
        folder.mkdir()
        file, self._log = folder / "settings.json", folder / "log.txt"
        file.write_text(json.dumps(settings | {"folder": str(folder)}), encoding="utf-8")
        reader, writer = os.pipe()
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("peer_sides.py"))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, kind, str(file), str(writer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                env={**os.environ, **ALONE, "MASTER_PORT": str(free_port())},
                text=True,
            )
        os.close(writer)
        self._replies = os.fdopen(reader)

    def wait(self) -> None:
        """Wait for what it does now."""
        line = self._replies.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended:\n{self._log.read_text()[-3000:]}")
        self.last = json.loads(line)

    def run(self) -> float:
        """Seconds of a turn."""
        print(self._steps, file=self._process.stdin, flush=True)
        self.wait()
        return self.last["seconds"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def write_run(path: Path, model: ModelConfig, sections: dict[str, dict[str, Any]]) -> None:
    """A run configuration on the random dataset beside it."""
    defaults = ModelConfig().to_dict()
    given = {key: value for key, value in model.to_dict().items() if value != defaults[key]}
    values = {"run": {"dir": str(path.with_suffix(".run"))}, "model": given, "train": {"num_steps": 2000}}
    values |= {"data": {"train": [str(path.with_name("train"))], "sequence_length": model.max_position_embeddings}}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


def write_random_dataset(prefix: Path, vocabulary: int, num_tokens: int) -> None:
    """Documents of 1000 random tokens."""
    draws = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(num_tokens // 1000):
            writer.add_document(draws.integers(0, vocabulary, 1000))
