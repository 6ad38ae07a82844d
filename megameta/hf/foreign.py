"""The config.json of a model from elsewhere: values by key, and one message for what cannot be represented."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megameta.errors import UserError


class HFValues:
    """Values of a config.json; what is asked of them and is not so is collected, and told at once.

    Args:
        path: for messages.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values = values
        self._path = path
        self._problems: list[str] = []

    def get(self, key: str, default: Any) -> Any:
        """A value; the default, which is transformers' own, where the file does not say."""
        return self._values.get(key, default)

    def expect(self, key: str, wanted: Any, *, default: Any) -> None:
        """Note a problem where the value is another."""
        if (value := self.get(key, default)) != wanted:
            self._problems.append(f"{key} is {value!r}, and only {wanted!r} can be represented")

    def choice(self, key: str, choices: Mapping[str, str], *, default: str) -> str:
        """What the value stands for; note a problem where it is none of the choices."""
        value = self.get(key, default)
        if value not in choices:
            self._problems.append(f"{key} is {value!r}, and only {', '.join(choices)} can be represented")
            return next(iter(choices.values()))
        return choices[value]

    def note(self, problem: str) -> None:
        """Note a problem."""
        self._problems.append(problem)

    def check(self) -> None:
        """Raise UserError with every problem noted."""
        if self._problems:
            raise UserError(
                "\n  ".join([f"{self._path}: the training model cannot compute what this one does:", *self._problems])
            )
