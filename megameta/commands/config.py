"""``megameta config``: show, check or describe a configuration."""

import argparse
import json
import sys

from megameta.commands.common import Commands, add_config_arguments


def add_parser(commands: Commands) -> None:
    config = commands.add_parser("config", help="show, check or describe a configuration")
    parts = config.add_subparsers(dest="part", required=True, metavar="PART")
    show = parts.add_parser("show", help="print every value as YAML")
    add_config_arguments(show)
    show.set_defaults(run=_show)
    check = parts.add_parser("check", help="check a configuration for a number of processes and describe the run")
    add_config_arguments(check)
    check.add_argument(
        "--gpus", type=int, default=None, metavar="N", help="GPUs of the run (default: 1 process on CPU)"
    )
    check.set_defaults(run=_check)
    schema = parts.add_parser("schema", help="print the JSON schema of configuration files, for editors")
    schema.set_defaults(run=_schema)


def _show(arguments: argparse.Namespace) -> None:
    from megameta.train.run_config import load_run_config

    sys.stdout.write(load_run_config(arguments.config, arguments.overrides, need_files=False).to_yaml())


def _check(arguments: argparse.Namespace) -> int:
    from megameta.plan.describe import check_config
    from megameta.train.run_config import load_run_config

    config = load_run_config(arguments.config, arguments.overrides, need_files=False)
    return check_config(config, arguments.config, gpus=arguments.gpus)


def _schema(arguments: argparse.Namespace) -> None:
    from megameta.config import config_schema

    json.dump(config_schema(), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
