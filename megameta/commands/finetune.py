"""``megameta finetune``."""

import argparse

from megameta.commands.common import Commands, add_config_arguments, add_launch_argument, launch, launches, listen


def add_parser(commands: Commands) -> None:
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune on the four tasks, in phases of growing length",
        description="Fine-tune a model on tasks (finetune.directory, from megameta tasks generate); weights come from"
        " init.from_checkpoint. Stops and goes on like train.",
    )
    add_config_arguments(finetune)
    add_launch_argument(finetune, "as of train")
    finetune.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune on this rank, or start the ranks."""
    if launches(arguments):
        return launch("finetune", arguments)
    stop = listen()
    from megameta.finetune.data import TaskData
    from megameta.train.run import train

    return train(arguments.config, arguments.overrides, TaskData, stop=stop)
