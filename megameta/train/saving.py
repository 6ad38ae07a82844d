"""The checkpoints of a run: every rank writes its share, beside the next steps or while training waits; then they are
the newest, and older ones go."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megameta.checkpoint import TrainerState, latest_checkpoint, prune, save_distributed
from megameta.checkpoint.background import BackgroundSaver
from megameta.checkpoint.ranks import Attempt
from megameta.checkpoint.store import point_latest, step_name, step_of
from megameta.cluster.heartbeat import SAVING, TRAINING
from megameta.cluster.session import RunSession
from megameta.config import RunConfig
from megameta.engine.engine import Engine
from megameta.errors import Superseded, UserError
from megameta.parallel.topology import Topology
from megameta.train.recording import RunRecords


class RunCheckpoints:
    """RUN/checkpoints, as one rank writes it. Making one is collective.

    Args:
        records: are brought to the disk before a checkpoint is the newest, so that after a power cut, too, they reach
            to the step that the run resumes from.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, session: RunSession, engine: Engine, records: RunRecords
    ) -> None:
        self._config, self._topology, self._session = config, topology, session
        self._engine, self._records = engine, records
        self.directory = Path(config.run.dir) / "checkpoints"
        self.saver: BackgroundSaver | None = None
        if config.checkpoint.async_save:
            group = dist.new_group(backend="gloo") if topology.world_size > 1 else None
            self.saver = BackgroundSaver(topology, group, pin_memory=topology.device_type == "cuda")
            engine.before_update = self.saver.wait_for_copies

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self.saver is not None and self.saver.is_writing

    def path(self, step: int) -> Path:
        """Of the checkpoint of a step."""
        return self.directory / step_name(step)

    def latest_step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        found = latest_checkpoint(self.directory.parent)
        return step_of(found) if found else 0

    def save(self, state: TrainerState) -> None:
        """Every rank writes its share, or has its thread do so beside the next steps. Collective."""
        engine, session = self._engine, self._session
        state = replace(state, optimizer_step=engine.state.optimizer_step, loss_scale=engine.loss_scale_state())
        path = self.path(state.step)
        self.complete()  # the one before, where threads take longer than checkpoint.interval
        session.enter(SAVING)
        if self.saver is not None:
            self.saver.begin(path, self._config, engine.state, state, session.attempt)
        else:
            save_distributed(path, self._config, engine.state, state, self._topology, session.attempt)
            self._publish_together(path)
        session.enter(TRAINING)

    def complete(self) -> None:
        """Wait for the checkpoint that is being written beside training, if one is, and publish it. Collective."""
        if self.saver is None or not self.saver.is_pending:
            return
        self._session.enter(SAVING)
        self._publish_together(self.saver.complete())
        self._session.enter(TRAINING)

    def close(self) -> None:
        """Drop what is not complete."""
        if self.saver is not None:
            self.saver.cancel()

    def _publish_together(self, path: Path) -> None:
        """``latest`` moves, and older checkpoints go; what fails on the main rank is raised on all."""
        failure: list[UserError | None] = [None]
        if self._topology.is_main:
            try:
                self._records.sync()
                self._publish(path, self._session.attempt)
            except Superseded as error:
                failure = [error]
            except (OSError, UserError) as error:
                remedy = "free space or mend the disk, then start the run again"
                failure = [UserError(f"{path} is saved, but {error}; {remedy}")]
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise failure[0]

    def _publish(self, path: Path, attempt: Attempt) -> None:
        """Make a saved checkpoint the newest, and remove what it replaces."""
        attempt.check()
        point_latest(path)
        if (heartbeat := self._session.monitor.heartbeat) is not None:
            heartbeat.saved_step = step_of(path)
        attempt.check()
        keep = self._config.checkpoint.keep
        if self.saver is not None:
            self.saver.prune(self.directory, keep)
        else:
            prune(self.directory, keep)
