"""What ``megameta analyze cache`` adds for a fine-tuned run: accuracy on its test examples under the rules of a cache.

It stands here because analyses and tasks do not know each other.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from megameta.data.loader import Batch
from megameta.finetune.data import TaskEvaluator
from megameta.paper.analysis.cache_sizes import task_finding
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.registry import Options
from megameta.parallel.topology import Topology

if TYPE_CHECKING:
    from megameta.paper.analysis.subject import Subject


def cache_on_tasks(subject: "Subject", options: Options) -> list[Finding]:
    """Accuracy against the rows that are kept, of each task at its longest evaluated bin; nothing where
    finetune.directory is not set.

    ``eval_examples`` of the configuration are scored of each task.
    """
    if subject.config.finetune.directory is None:
        return []
    evaluator = TaskEvaluator(subject.config, Topology(device=subject.device))
    longest: dict[str, int] = defaultdict(int)
    for name in evaluator.sets:
        task, _, bound = name.partition("/")
        longest[task] = max(longest[task], int(bound))
    tasks: dict[str, list[Batch]] = {
        f"{task}, {bound} tokens": [batch.to(subject.device) for batch in evaluator.batches(f"{task}/{bound}")]
        for task, bound in longest.items()
    }
    return [task_finding(subject, tasks, options)]
