"""``megameta …``: the commands for people. Every command also runs as ``python -m megameta …``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from megameta import __version__
from megameta.errors import UserError, run_tool


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="megameta", description="Pre-train language models with learned meta-tokens.")
    parser.add_argument("--version", action="version", version=f"megameta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train the model of a configuration. A run that was stopped goes on by itself when started again."
        " Exit codes: 0 done, 1 failed, 75 stopped by SIGTERM or SIGUSR1 after saving a checkpoint.",
    )
    _add_config_arguments(train)
    train.add_argument(
        "--nproc-per-node",
        metavar="N",
        default=None,
        help="start N processes on this machine; auto: one a GPU (torchrun, deepspeed and srun work too)",
    )
    train.set_defaults(run=_train)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune on the four tasks, in phases of growing length",
        description="Fine-tune a model on tasks (finetune.directory, from megameta tasks generate); weights come from"
        " init.from_checkpoint. Stops and goes on like train.",
    )
    _add_config_arguments(finetune)
    finetune.add_argument("--nproc-per-node", metavar="N", default=None, help="as of train")
    finetune.set_defaults(run=_finetune)
    _add_extend(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_tokenizer(commands)
    _add_tasks(commands)
    _add_reproduce(commands)
    _add_plan(commands)
    config = commands.add_parser("config", help="show, check or describe a configuration")
    parts = config.add_subparsers(dest="part", required=True, metavar="PART")
    show = parts.add_parser("show", help="print every value as YAML")
    _add_config_arguments(show)
    show.set_defaults(run=_config_show)
    check = parts.add_parser("check", help="check a configuration for a number of processes and describe the run")
    _add_config_arguments(check)
    check.add_argument(
        "--gpus", type=int, default=None, metavar="N", help="GPUs of the run (default: 1 process on CPU)"
    )
    check.set_defaults(run=_config_check)
    schema = parts.add_parser("schema", help="print the JSON schema of configuration files, for editors")
    schema.set_defaults(run=_config_schema)
    return parser


def _add_extend(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    extend = commands.add_parser(
        "extend",
        help="write the configuration of going on at a longer window",
        description="From a run or checkpoint with rotary positions, write the YAML file of continued pre-training (or"
        " of fine-tuning, where the run did that) at a multiple of its window: sequences, scaled positions, batch,"
        " steps and schedule. docs/extension.md says what the methods do. Nothing is trained here.",
    )
    add = extend.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT")
    add("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the new configuration")
    add("--factor", type=float, required=True, help="of the window")
    add("--method", choices=("yarn", "ntk", "linear", "none"), default="yarn", help="of scaling (default: yarn)")
    add("--total", action="store_true", help="of an extended model: the factor is of the window before any extension")
    add("--output", metavar="FILE", default=None, help="(default: RUN-METHODFACTOR.yaml in this directory)")
    add("--steps", type=int, default=None, metavar="N", help="(default: a hundredth of the run's, at least 100)")
    add("--lr", type=float, default=None, help="peak learning rate (default: that at the end of the run)")
    extend.set_defaults(run=_extend)


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="held-out loss, perplexity and bits per byte",
        description="Evaluate a checkpoint, the latest one of a run, or a HuggingFace export on held-out datasets."
        " A run brings its configuration; overrides may name other sets (data.valid=PREFIX), more samples"
        " (eval.num_samples=0: all) or switches of the model (model.zero_meta_positions=true).",
    )
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT_OR_EXPORT")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the run")
    evaluate.add_argument("--json", metavar="FILE", default=None, help="also write the numbers there")
    evaluate.add_argument(
        "--by-position",
        type=int,
        default=0,
        metavar="BUCKETS",
        help="also by position in the sequence, in as many parts",
    )
    evaluate.set_defaults(run=_evaluate)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser("generate", help="continue a prompt with a HuggingFace export")
    generate.add_argument("source", metavar="EXPORT")
    generate.add_argument("--prompt", required=True, help="text; <|meta|> in it is the meta-token")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations, when sampling")
    generate.set_defaults(run=_generate)


def _add_tokenizer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenizer = commands.add_parser("tokenizer", help="show how a tokenizer cuts a text")
    parts = tokenizer.add_subparsers(dest="part", required=True, metavar="PART")
    show = parts.add_parser("show", help="print the tokens of a text: id, place, bytes")
    show.add_argument("text", metavar="TEXT", nargs="?", help="the text, or --file")
    show.add_argument("--tokenizer", required=True, metavar="PATH", help="directory, tokenizer.json or .model")
    show.add_argument("--file", metavar="FILE", help="a text file; -: standard input")
    show.add_argument("--prompt", action="store_true", help="take <|meta|> and <|endoftext|> for special tokens")
    show.add_argument("--limit", type=int, default=200, metavar="N", help="tokens to list (200; 0: all)")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=_tokenizer_show)


def _add_tasks(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tasks = commands.add_parser("tasks", help="make the paper's four tasks, or show examples of them")
    parts = tasks.add_subparsers(dest="part", required=True, metavar="PART")
    generate = parts.add_parser(
        "generate",
        help="make datasets of the tasks",
        description="Write DIR/TASK/train.jsonl and test.jsonl, a dataset card (datasets.load_dataset(DIR, TASK)) and"
        " lm-eval task files. The same seed and tokenizer give the same bytes.",
    )
    add = generate.add_argument
    add("--tokenizer", required=True, metavar="PATH", help="lengths are in its tokens")
    add("--output", required=True, metavar="DIR")
    add("--tasks", nargs="+", default=None, metavar="TASK", help="(all: list_recall segment_counting parity copying)")
    add("--bins", nargs="+", type=int, default=None, metavar="N", help="length bins (128 256 512 1024 2048)")
    add("--difficulties", nargs="+", default=None, metavar="LEVEL", help="(easy medium hard extra-hard long)")
    add("--train", type=int, default=None, metavar="N", help="examples of each task (90000)")
    add("--test", type=int, default=None, metavar="N", help="examples of each task (10000)")
    add("--seed", type=int, default=None)
    add("--overwrite", action="store_true", help="replace a directory that is there")
    generate.set_defaults(run=_tasks_generate)
    evaluate = parts.add_parser(
        "evaluate",
        help="accuracy of a fine-tuned model by task, bin and difficulty",
        description="Score a run, checkpoint or export on test examples: exact match of the whole answer, as greedy"
        " decoding gives it, with 95 % intervals (Wilson). A run brings its configuration; overrides may name other"
        " examples (finetune.directory=DIR finetune.eval_examples=0 finetune.eval_bins=[512]) or switches of the model"
        " (model.zero_meta_positions=true).",
    )
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT_OR_EXPORT")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the run")
    evaluate.add_argument("--json", metavar="FILE", default=None, help="also write the numbers there")
    evaluate.set_defaults(run=_tasks_evaluate)
    show = parts.add_parser("show", help="print examples, as models with and without meta-tokens read them")
    show.add_argument("file", metavar="FILE", help="a .jsonl of tasks generate")
    show.add_argument("--count", type=int, default=3, metavar="N")
    show.set_defaults(run=_tasks_show)


def _add_reproduce(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="a figure or table of the paper, from nothing to the report",
        description="Pre-train the models that are compared, fine-tune and evaluate them, and write a report with the"
        " paper's numbers beside ours: OUTPUT/TARGET/report.md. Interrupted and started again, it goes on.",
    )
    reproduce.add_argument("target", choices=("figure1", "table1", "table2", "ppl", "inference"))
    reproduce.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the scale")
    reproduce.add_argument(
        "--scale",
        default="cpu",
        metavar="SCALE",
        help="cpu (default), cpu-recall, cpu-full, gpu-30min, paper, or a YAML file",
    )
    reproduce.add_argument("--output", default=None, metavar="DIR", help="for all targets (default: reproduce/SCALE)")
    reproduce.add_argument("--jobs", type=int, default=None, metavar="N", help="runs at a time (one a GPU or core)")
    reproduce.add_argument(
        "--time-limit", type=float, default=None, metavar="MINUTES", help="stop then, to go on later"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="only list what is to be done")
    reproduce.set_defaults(run=_reproduce)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="propose parallel layouts that fit a number of GPUs",
        description="List layouts (tensor, pipeline and data parallel, ZeRO stage, micro-batch, recomputation) that"
        " fit, the fastest first by a cost model; docs/planning.md states it. Defaults are for H100 SXM nodes.",
    )
    _add_config_arguments(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N")
    plan.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="of one GPU (default: 80GB)")
    plan.add_argument("--gpus-per-node", type=int, default=None, metavar="N", help="(default: 8)")
    plan.add_argument("--peak-tflops", type=float, default=None, help="of a GPU (default: 989; in fp32 67)")
    plan.add_argument("--efficiency", type=float, default=None, help="of matrix products (default: 0.6)")
    plan.add_argument("--memory-bandwidth", type=float, default=None, metavar="GB/S", help="(default: 3000)")
    plan.add_argument("--intra-bandwidth", type=float, default=None, metavar="GB/S", help="in a node (default: 300)")
    plan.add_argument("--inter-bandwidth", type=float, default=None, metavar="GB/S", help="between nodes (default: 40)")
    plan.add_argument("--limit", type=int, default=10, metavar="N", help="layouts to show (default: 10)")
    plan.add_argument("--json", metavar="FILE", default=None, help="also write them there")
    plan.set_defaults(run=_plan)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``megameta`` command; exits."""
    parser = build_parser()
    # Overrides may stand after options, which argparse's own positional list does not allow under subcommands.
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" not in arguments or any(word.startswith("-") or "=" not in word for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        arguments.overrides += rest
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    run_tool(lambda: command(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from megameta.parallel.launch import launch_local, pick_device
    from megameta.train.run import train

    if arguments.nproc_per_node is not None and "RANK" not in os.environ:
        count = _process_count(arguments.nproc_per_node, pick_device("auto"))
        return launch_local(["train", arguments.config, *arguments.overrides], count)
    return train(arguments.config, arguments.overrides)


def _finetune(arguments: argparse.Namespace) -> int:
    from megameta.parallel.launch import launch_local, pick_device
    from megameta.tasks.finetune import TaskData
    from megameta.train.run import train

    if arguments.nproc_per_node is not None and "RANK" not in os.environ:
        count = _process_count(arguments.nproc_per_node, pick_device("auto"))
        return launch_local(["finetune", arguments.config, *arguments.overrides], count)
    return train(arguments.config, arguments.overrides, TaskData)


def _extend(arguments: argparse.Namespace) -> int:
    from megameta.commands.extend import extend

    options = {key: getattr(arguments, key) for key in ("factor", "method", "total", "output", "steps", "lr")}
    return extend(arguments.source, arguments.overrides, **options)


def _evaluate(arguments: argparse.Namespace) -> int:
    from megameta.commands.evaluate import evaluate

    return evaluate(arguments.source, arguments.overrides, json_path=arguments.json, buckets=arguments.by_position)


def _generate(arguments: argparse.Namespace) -> int:
    from megameta.commands.generate import generate

    return generate(
        arguments.source,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
    )


def _tokenizer_show(arguments: argparse.Namespace) -> int:
    from megameta.commands.tokenizer import show

    options = {"as_prompt": arguments.prompt, "as_json": arguments.json, "limit": arguments.limit}
    return show(arguments.tokenizer, arguments.text, arguments.file, **options)


def _tasks_generate(arguments: argparse.Namespace) -> int:
    from megameta.commands.tasks import generate_tasks

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    return generate_tasks({key: value for key, value in given.items() if key not in ("command", "part", "run")})


def _tasks_evaluate(arguments: argparse.Namespace) -> int:
    from megameta.commands.evaluate_tasks import evaluate_tasks

    return evaluate_tasks(arguments.source, arguments.overrides, json_path=arguments.json)


def _tasks_show(arguments: argparse.Namespace) -> int:
    from megameta.commands.tasks import show_tasks

    return show_tasks(arguments.file, arguments.count)


def _reproduce(arguments: argparse.Namespace) -> int:
    from megameta.commands.reproduce import reproduce

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError("--jobs is at least 1")
    return reproduce(
        arguments.target,
        arguments.scale,
        arguments.overrides,
        output=arguments.output,
        jobs=arguments.jobs,
        time_limit=arguments.time_limit,
        dry_run=arguments.dry_run,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from megameta.commands.plan import make_plan

    def scaled(value: float | None, unit: float) -> float | None:
        return None if value is None else value * unit

    return make_plan(
        arguments.config,
        arguments.overrides,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        hardware={
            "gpus_per_node": arguments.gpus_per_node,
            "peak_flops": scaled(arguments.peak_tflops, 1e12),
            "efficiency": arguments.efficiency,
            "memory_bandwidth": scaled(arguments.memory_bandwidth, 1e9),
            "intra_bandwidth": scaled(arguments.intra_bandwidth, 1e9),
            "inter_bandwidth": scaled(arguments.inter_bandwidth, 1e9),
        },
        limit=arguments.limit,
        json_path=arguments.json,
    )


def _process_count(wanted: str, device: str) -> int:
    if wanted == "auto":
        import torch

        return torch.cuda.device_count() if device == "cuda" else 1
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"--nproc-per-node {wanted}: a number of at least 1, or auto")
    return int(wanted)


def _config_show(arguments: argparse.Namespace) -> None:
    from megameta.train.setup import load_run_config

    sys.stdout.write(load_run_config(arguments.config, arguments.overrides, need_files=False).to_yaml())


def _config_check(arguments: argparse.Namespace) -> int:
    from megameta.train.check import check_config

    return check_config(arguments.config, arguments.overrides, gpus=arguments.gpus)


def _config_schema(arguments: argparse.Namespace) -> None:
    from megameta.config import config_schema

    json.dump(config_schema(), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
