"""Documents of a dataset on the HuggingFace hub, streamed: nothing is stored on this machine."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megameta.corpus.readers import Block, Position, blocks_of_rows
from megameta.errors import UserError

_ROWS = 256


@dataclass(frozen=True)
class HubDataset:
    """A dataset's name on the hub (or a directory laid out like one), its split and its configuration.

    ``revision``: the commit it is read at; see ``pinned``.
    """

    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    @property
    def label(self) -> str:
        return "/".join(part for part in (self.name, self.config, self.split) if part)

    def pinned(self) -> "HubDataset":
        """The same with the commit that is newest now, so that a command that goes on later reads the same rows.

        Raises UserError where the hub cannot be reached or has no such dataset.
        """
        if os.path.isdir(self.name):
            return self
        from huggingface_hub import HfApi

        try:
            revision = HfApi().dataset_info(self.name).sha
        except Exception as error:  # the library raises the errors of whichever HTTP client it uses
            raise _unreachable(self, error) from error
        return HubDataset(self.name, self.split, self.config, revision)


def read_hub_blocks(hub: HubDataset, columns: Sequence[str], start: Position) -> Iterator[Block]:
    """The rows of ``hub`` from ``start`` on, as blocks; only ``columns`` of them where the dataset has these."""
    import datasets

    try:
        rows: Any = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True)
        if rows.column_names:
            rows = rows.select_columns([column for column in columns if column in rows.column_names])
        rows = iter(rows.skip(start.items) if start.items else rows)
    except Exception as error:  # as above
        raise _unreachable(hub, error) from error
    done = start.items
    while True:
        try:
            part = list(itertools.islice(rows, _ROWS))
        except Exception as error:  # as above
            raise UserError(f"{hub.label}: row {done + 1} or one soon after it cannot be read: {error}") from error
        if not part:
            return
        yield from blocks_of_rows(hub.label, done + 1, part, 0.0, Position(0, done))
        done += len(part)


def _unreachable(hub: HubDataset, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"--hf-dataset {hub.label} cannot be opened: {first}. It needs the network, the right name, --hf-config and "
        "--hf-split; without a network, download the files elsewhere and name them with --input"
    )
