"""What makes a directory of tasks a HuggingFace dataset and a set of lm-eval tasks."""

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megameta.tasks.definitions import MARKER, TASKS
from megameta.tokenizers import META_TOKEN

if TYPE_CHECKING:
    from megameta.tasks.generate import Summary


def card(seed: int, summaries: "list[Summary]") -> str:
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
    from megameta.tasks.examples import PLAIN_MARKER

    files = {}
    for name, longest in answer_tokens.items():
        plain = PLAIN_MARKER if TASKS[name].marker_defines else ""
        for suffix, marker in (("", META_TOKEN), ("_plain", plain)):
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
