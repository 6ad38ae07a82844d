"""Paths of the helpers that several folders of tests share."""

import sys
from pathlib import Path

for folder in (".", "train", "parallel", "model", "checkpoint", "slurm"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
