"""The file that names the newest checkpoint: damaged, or naming nothing."""

from pathlib import Path

import pytest
import torch

from megameta.checkpoint.save import write_checkpoint
from megameta.checkpoint.store import (
    find_checkpoint,
    latest_checkpoint,
    open_checkpoint,
    point_latest,
    prune,
    step_name,
)
from megameta.config import build_config
from megameta.errors import UserError

CONFIG = build_config({"data": {"train": "x"}})


def tensors() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(4.0)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / step_name(7)
    write_checkpoint(path, CONFIG, tensors())
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\x00\x81", "not readable"),
        (b"", "names ''"),
        (b"\x00\x01", "no checkpoint"),
        (b"step_00000009\n", "names 'step_00000009'"),
        (b"../step_00000007", "no checkpoint"),
        (b"/", "no checkpoint"),
        (b"x" * 5000, "no checkpoint"),
    ],
    ids=["binary", "empty", "control", "absent", "outside", "root", "long"],
)
def test_a_damaged_pointer_says_what_to_write_into_it(written, data, message):
    run_dir = written.parent.parent
    write_checkpoint(written.with_name(step_name(5)), CONFIG, tensors())
    (written.parent / "latest").write_bytes(data)
    for use in (latest_checkpoint, find_checkpoint, open_checkpoint, lambda path: prune(path / "checkpoints", 1)):
        with pytest.raises(UserError, match=rf"(?s)checkpoints/latest: .*{message}.*into it, .* {step_name(7)}"):
            use(run_dir)
    assert {path.name for path in written.parent.iterdir()} == {"latest", step_name(5), step_name(7)}


def test_a_pointer_where_nothing_is_left(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    with pytest.raises(UserError, match="remove this file to start from the beginning"):
        open_checkpoint(tmp_path)


def test_killed_between_the_two_renames(written):
    """The one moment at which a name has no checkpoint: the message says how to get it back."""
    point_latest(written)
    written.rename(written.with_name(f".{written.name}.old"))
    with pytest.raises(UserError, match=rf"rename .*\.{written.name}\.old to {written.name}"):
        open_checkpoint(written.parent.parent)
