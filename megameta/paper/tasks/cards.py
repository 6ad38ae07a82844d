"""What makes a directory of tasks a HuggingFace dataset and a set of lm-eval tasks."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megameta.finetune.examples import MARKER, plain_marker
from megameta.tokenizers import META_TOKEN


@dataclass
class Summary:
    """What was made of one task.

    Attributes:
        answer_tokens: of the longest answer, its end included.
        cells: examples by bin and difficulty; ``impossible``: those that none fits.
    """

    task: str
    train: int = 0
    test: int = 0
    redrawn: int = 0
    answer_tokens: int = 0
    cells: dict[str, int] = field(default_factory=dict)
    impossible: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)


def card(seed: int, summaries: list[Summary]) -> str:
    """README.md: the configurations that ``load_dataset`` reads, and what they hold."""
    configs = [
        {
            "config_name": summary.task,
            "data_files": [{"split": split, "path": f"{summary.task}/{split}.jsonl"} for split in ("train", "test")],
        }
        for summary in summaries
    ]
    lines = [
        "---",
        yaml.safe_dump({"configs": configs}, sort_keys=False).strip(),
        "---",
        "",
        "# Tasks with markers",
        "",
    ]
    lines += [
        f"Made by `megameta tasks generate`, seed {seed}. Fields: task, difficulty, bin (most tokens), prompt, answer.",
        f"`{MARKER.strip()}` in a prompt is a place of the meta-token. No text is in both splits, markers or not.",
        "",
        "| task | train | test |",
        "|---|---:|---:|",
        *[f"| {summary.task} | {summary.train:,} | {summary.test:,} |" for summary in summaries],
    ]
    return "\n".join(lines) + "\n"


def harness_files(answer_tokens: dict[str, int], directory: Path) -> dict[str, str]:
    """lm-eval task files by name: of each task one with meta-tokens and one as models without them read it.

    Args:
        answer_tokens: of the longest answer of each task, its end included.
    """
    files = {}
    for name, longest in answer_tokens.items():
        for suffix, marker in (("", META_TOKEN), ("_plain", plain_marker(name))):
            files[f"megameta_{name}{suffix}.yaml"] = yaml.safe_dump(
                {
                    "task": f"megameta_{name}{suffix}",
                    "dataset_path": "json",
                    "dataset_kwargs": {
                        "data_files": {split: str(directory / name / f"{split}.jsonl") for split in ("train", "test")}
                    },
                    "output_type": "generate_until",
                    "training_split": "train",
                    "test_split": "test",
                    "doc_to_text": "{{prompt | replace('" + MARKER + "', '" + marker + "')}}",
                    "doc_to_target": " {{answer}}",
                    "generation_kwargs": {"until": ["\n"], "max_gen_toks": longest, "do_sample": False},
                    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                    "metadata": {"version": 1.0},
                },
                sort_keys=False,
            )
    return files
