"""Errors meant for the person at the terminal, and the exit codes of every command."""

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
#: The run was asked to stop (SIGTERM, SIGUSR1), saved a checkpoint, and goes on when started again. EX_TEMPFAIL.
EXIT_INTERRUPTED = 75
#: A node was lost, the run hung, or a newer attempt has the run directory: nothing is wrong with the run itself, and
#: started again it goes on from its last checkpoint. EX_PROTOCOL.
EXIT_LOST = 76


class UserError(Exception):
    """A mistake or a condition that its reader can mend: what is wrong, where (file, line, key, rank), what to do.

    Commands print the message alone, without a stack trace, and exit with ``EXIT_FAILURE``.
    """


class Superseded(UserError):
    """A newer attempt of the run has started, and the run directory is its own: ``EXIT_LOST``."""


class MachineError(UserError):
    """A fault of one machine that not all ranks there have: the rank that has it says so itself."""


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and exit: 0 or what it returns, 1 with the message alone for a user's mistake."""
    try:
        sys.exit(main() or EXIT_OK)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
