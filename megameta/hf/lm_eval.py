"""``megameta evaluate EXPORT --tasks …``: lm-eval's tasks, with a policy for meta-tokens."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megameta.errors import UserError
from megameta.files import write_text_atomically
from megameta.hf.generation import make_policy
from megameta.tokenizers import load_tokenizer


def evaluate_harness(
    source: str,
    tasks: list[str],
    *,
    policy: str = "given",
    every: int = 10,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    json_path: str | None = None,
    device: str = "cpu",
) -> int:
    """Run tasks on an export and print their metrics.

    Args:
        policy, every: ``megameta.hf.insertion.MetaPolicy``.
        include_path: a directory of task files beside lm-eval's own.
        limit: examples of each task; below 1 a share of them.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('lm-eval is not installed: pip install "megameta[eval]"')
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megameta.hf.harness import HarnessModel
    from megameta.hf.load import load_causal_lm

    model = load_causal_lm(source).to(device)
    tokenizer = load_tokenizer(source)
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = f"lm-eval or {include_path}" if include_path else "lm-eval (--include-path DIR adds task files)"
        raise UserError(f"--tasks: no task {unknown[0]} in {where}; lm_eval ls tasks lists them")
    chosen = make_policy(policy, every, tokenizer, takes_meta=hasattr(model.config, "meta_token_id"))
    results = simple_evaluate(
        model=HarnessModel(model, tokenizer, chosen, batch_size=batch_size),
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        verbosity="WARNING",
    )
    rows = metric_rows(results)
    how = f"every {every}th slot" if policy == "every" else policy
    Console().print(_table(source, f"meta-tokens: {how}", rows))
    if json_path is not None:
        record = {"source": source, "policy": policy, "every": every if policy == "every" else None, "results": rows}
        write_text_atomically(Path(json_path), json.dumps(record, indent=1) + "\n")
    return 0


def metric_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Task, metric, value, standard error and examples of what ``simple_evaluate`` returns."""
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            count = results.get("n-samples", {}).get(task, {}).get("effective")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append(
                {"task": task, "metric": name, "value": value, "stderr": error if known else None, "examples": count}
            )
    return rows


def _table(source: str, caption: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{source}: lm-eval", caption=caption)
    for column in ("task", "metric", "value", "standard error", "examples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in rows:
        error = "–" if row["stderr"] is None else f"{row['stderr']:.4f}"
        table.add_row(row["task"], row["metric"], f"{row['value']:.4f}", error, str(row["examples"] or "–"))
    return table
