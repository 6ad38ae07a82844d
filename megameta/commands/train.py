"""``megameta train``."""

import argparse

from megameta.commands.common import Commands, add_config_arguments, add_launch_argument, launch, launches, listen


def add_parser(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train the model of a configuration. A run that was stopped goes on by itself when started again."
        " Exit codes: 0 done, 1 failed, 75 stopped by SIGTERM or SIGUSR1 after saving a checkpoint.",
    )
    add_config_arguments(train)
    add_launch_argument(
        train, "start N processes on this machine; auto: one a GPU (torchrun, deepspeed and srun work too)"
    )
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train on this rank, or start the ranks."""
    if launches(arguments):
        return launch("train", arguments)
    stop = listen()
    from megameta.paper.analysis.training import AttentionProbe
    from megameta.train.run import train

    return train(arguments.config, arguments.overrides, make_probe=AttentionProbe, stop=stop)
