"""The training run: steps, evaluations, checkpoints, and an exact resume."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megameta.checkpoint import (
    Checkpoint,
    TrainerState,
    check_resumable,
    latest_checkpoint,
    open_checkpoint,
    prune,
    save_distributed,
)
from megameta.checkpoint.background import BackgroundSaver
from megameta.checkpoint.store import point_latest, step_name, step_of
from megameta.cluster.attempt import Attempt
from megameta.cluster.heartbeat import EVALUATING, FAILED, PHASE_OF, SAVING, TRAINING
from megameta.cluster.machine import measure_peak_flops
from megameta.cluster.session import RunSession, open_run
from megameta.cluster.stop import StopRequest
from megameta.config import RunConfig
from megameta.config.deepspeed import zero_stage
from megameta.config.derived import step_flops
from megameta.data.counter_random import make_key
from megameta.data.loader import next_batch_number
from megameta.engine.build import initial_weights, settle_on
from megameta.engine.engine import NonFiniteGradient, NonFiniteLoss
from megameta.engine.pipeline_engine import make_engine
from megameta.engine.replicas import check_replicas
from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, Superseded, UserError
from megameta.files import write_text_atomically
from megameta.log import LOG, duration
from megameta.model import Attention
from megameta.parallel.topology import Topology
from megameta.train.data import MakeProbe, PretrainingData, Probe, RunData
from megameta.train.display import StepDisplay
from megameta.train.metrics import MetricsFile, TensorBoard
from megameta.train.schedule import learning_rate


class Trainer:
    """A run on one rank. Every rank makes one and calls ``run``."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        make_data: Callable[[RunConfig, Topology], RunData] = PretrainingData,
        make_probe: MakeProbe | None = None,
        session: RunSession | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config = config
        self.topology = topology
        self.directory = Path(config.run.dir)
        self.checkpoints = self.directory / "checkpoints"
        self._owns_session = session is None
        self.session = session if session is not None else open_run(config, topology)
        self.stop = stop if stop is not None else StopRequest()
        checkpoint = self._find_checkpoint()
        self.config = config = settle_on(config, topology, checkpoint.config if checkpoint else None)
        if checkpoint:
            check_resumable(checkpoint.config, config, str(checkpoint.path))
        self.data = make_data(config, topology)
        self.loader = self.data.loader()
        self.probe: Probe | None = None
        if config.analysis.interval and make_probe is not None:
            self.probe = make_probe(config, topology)
        self.saver: BackgroundSaver | None = None
        if config.checkpoint.async_save:
            group = dist.new_group(backend="gloo") if topology.world_size > 1 else None
            self.saver = BackgroundSaver(topology, group, pin_memory=topology.device_type == "cuda")
        self.state = TrainerState(step=0, next_batch=0, tokens=0, targets=0, optimizer_step=0)
        weights = checkpoint.weights() if checkpoint else initial_weights(config, topology)
        self.engine = make_engine(config, topology, weights)
        if checkpoint:
            self.state = checkpoint.trainer()
            self.engine.state.load_moments(checkpoint.moments(), self.state.optimizer_step)
            self.engine.load_loss_scale(self.state.loss_scale)
        if self.saver is not None:
            self.engine.before_update = self.saver.wait_for_copies
        self.session.monitor.groups = {
            "world": dist.group.WORLD,
            "data": self.engine.groups.data,
            "tensor": self.engine.groups.layers.group,
        }
        self.engine.flags = self._flags
        self._describe(checkpoint)
        self._open_records()

    # --- start ------------------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from. Rank 0's look at the directory counts for all."""
        found: list[Any] = [latest_checkpoint(self.directory) if self.topology.is_main else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return None
        return open_checkpoint(found[0], self.topology)

    def _describe(self, checkpoint: Checkpoint | None) -> None:
        config, engine = self.config, self.engine
        parameters = sum(math.prod(shape) for shape in engine.state.shapes.values())
        kernel = next(module.name for module in engine.model.modules() if isinstance(module, Attention))
        LOG.info("run %s: %s parameters", config.run.dir, f"{parameters:,}")
        LOG.info(
            "%d rank(s) on %s (%s), attention %s; %d × %d × %d sequences a step",
            self.topology.world_size,
            self.topology.device_type,
            describe_layout(config, self.topology),
            kernel,
            config.train.micro_batch_size,
            engine.accumulation_steps,
            self.topology.data_parallel_size,
        )
        for line in self.data.describe():
            LOG.info("%s", line)
        if checkpoint:
            LOG.info("going on from %s", checkpoint.path)
        elif start := config.init.from_hf or config.init.from_checkpoint:
            LOG.info("weights from %s", start)
        if (heartbeat := self.session.monitor.heartbeat) is not None:
            heartbeat.step = heartbeat.saved_step = self.state.step

    def _open_records(self) -> None:
        self.metrics: MetricsFile | None = None
        self.tensorboard: TensorBoard | None = None
        self.display: StepDisplay | None = None
        if not self.topology.is_main:
            return
        config = self.config
        write_text_atomically(self.directory / "config.yaml", config.to_yaml())
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", self.state.step, self.session.attempt)
        if config.log.tensorboard:
            self.tensorboard = TensorBoard(self.directory / "tensorboard", self.state.step)

    # --- run --------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to train.num_steps; returns an exit code of ``megameta.errors``."""
        self.stop.listen()
        phase = FAILED
        try:
            if self.state.step >= self.config.train.num_steps:
                LOG.info("the run is complete at step %d; raise train.num_steps to go on", self.state.step)
                code = EXIT_OK
            else:
                code = self._train()
            phase = PHASE_OF[code]
            return code
        finally:
            self._close()
            if self._owns_session:
                self.session.close(phase)

    def _train(self) -> int:
        config, topology = self.config, self.topology
        peak = config.train.peak_tflops
        peak_flops = peak * 1e12 if peak else measure_peak_flops(topology.device, config.train.precision)
        source = "train.peak_tflops" if peak else f"measured with {config.train.products} products"
        LOG.info("mfu is a share of %.3g TFLOP/s a rank, %s", peak_flops / 1e12, source)
        slots = config.train.global_batch_size * config.data.sequence_length
        self._flops_rate = step_flops(config) / slots / (peak_flops * topology.world_size)
        self._durations: deque[float] = deque(maxlen=50)
        if topology.is_main:
            self.display = StepDisplay("training", config.train.num_steps, self.state.step, config.log.interval)
        self._enter(TRAINING)
        while self.state.step < config.train.num_steps:
            self._step()
            step, last = self.state.step, self.state.step == config.train.num_steps
            asks = topology.world_size == 1  # costs nothing
            if config.train.check_replicas_every and step % config.train.check_replicas_every == 0:
                check_replicas(self.engine.state, step)
            sets = self.data.evaluator.names(final=last)
            if sets and (last or self.data.evaluates(step)):
                self._evaluate(sets)
                asks = True  # much may have happened since the step
            if self.probe is not None and step % config.analysis.interval == 0:
                self._analyze(self.probe)
                asks = True  # much may have happened since the step
            # What came with the step's loss, or is asked for, which the host waits for.
            stopping, is_writing = self.engine.any_rank(*self._flags()) if asks else self.engine.flagged
            if not is_writing:
                self._complete_save()
            if last or stopping or step % config.checkpoint.interval == 0:
                self._save()
            if last or stopping:
                self._complete_save()
            if stopping and not last:
                LOG.info("stopped by a signal after step %d; saved; start it again to go on", step)
                return EXIT_INTERRUPTED
        LOG.info("done: %d steps, checkpoint %s", self.state.step, self.checkpoints / step_name(self.state.step))
        LOG.info("next: python tools/convert_checkpoint.py to-hf %s --output DIR", config.run.dir)
        return EXIT_OK

    def _flags(self) -> tuple[bool, bool]:
        """Whether this rank is asked to stop, and whether its thread is writing."""
        return self.stop.requested, self.saver is not None and self.saver.is_writing

    def _step(self) -> None:
        config, state = self.config, self.state
        start = time.perf_counter()
        batch_number = next_batch_number(state.next_batch, config.data.skip)
        following = next_batch_number(batch_number + 1, config.data.skip)
        step = state.step + 1
        # Nothing here draws; what a user adds (dropout) draws the same after a resume, whatever the replica's layout.
        torch.manual_seed(make_key("step", config.run.seed, step, self.topology.data_parallel_rank) >> 1)
        lr = learning_rate(step, config.train.num_steps, config.optimizer)
        try:
            batches = self.loader.read(batch_number, following)
            result = self.engine.train_step(batches, lr)
        except UserError as error:
            if isinstance(error, NonFiniteLoss | NonFiniteGradient):  # on every rank, so that all can save together
                self._complete_save()
            updated = isinstance(error, NonFiniteGradient) and error.updated
            untouched = "" if updated else "Nothing was updated; "
            raise UserError(
                f"step {step}, batch {batch_number}: {error}. {untouched}the last checkpoint is that of step"
                f" {self._saved_step()}. Look at the samples, or pass over them with data.skip=[[{batch_number},"
                f" {following}]]"
            ) from error
        slots = sum(batch.token_BT.numel() for batch in batches) * self.topology.data_parallel_size
        self.state = replace(
            state,
            step=step,
            next_batch=following,
            tokens=state.tokens + slots,
            targets=state.targets + result.num_targets,
            optimizer_step=state.optimizer_step + int(result.applied),
        )
        self.session.monitor.progress()
        self.session.slow_ranks.add(self.engine.forward_seconds)
        seconds = time.perf_counter() - start
        self._durations.append(seconds)
        record: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": lr,
            "tokens": self.state.tokens,
            "targets": result.num_targets,
            "tokens_per_second": slots / seconds,
            "mfu": self._flops_rate * slots / seconds,
            "batch": batch_number,
        }
        if not result.applied:
            record["skipped"] = True
        if step % config.log.interval == 0 or step == config.train.num_steps:
            record["epochs"] = self.data.epochs(following)
        self._record_step(record, slots)

    def _record_step(self, record: dict[str, Any], slots: int) -> None:
        step, num_steps = record["step"], self.config.train.num_steps
        if self.metrics:
            self.metrics.write(record)
        if self.tensorboard and (step % self.config.log.interval == 0 or step == num_steps):
            series = {f"train/{k}": v for k, v in record.items() if k not in ("step", "batch", "skipped", "epochs")}
            series |= {f"epochs/{name}": count for name, count in record["epochs"].items()}
            self.tensorboard.write(step, series)
        if self.display:
            typical = statistics.median(self._durations)
            speed, left = slots / typical, typical * (num_steps - step)
            self.display.step(step, record["loss"], record["lr"], speed, left)
            if (heartbeat := self.session.monitor.heartbeat) is not None:
                heartbeat.step = step
                heartbeat.numbers = {"loss": record["loss"], "tokens_per_second": speed, "eta_seconds": left}

    def _enter(self, phase: str) -> None:
        """Something else than before begins: for the heartbeat and the watchdog."""
        self.session.monitor.progress()
        if (heartbeat := self.session.monitor.heartbeat) is not None:
            heartbeat.phase, heartbeat.step = phase, self.state.step

    def _evaluate(self, sets: list[str]) -> None:
        start = time.perf_counter()
        self._enter(EVALUATING)
        results = self.data.evaluator.run(self.engine, sets)
        step = self.state.step
        values = {
            f"{name}/{measure}": value
            for name, result in results.items()
            for measure, value in vars(result).items()
            if value is not None
        }
        if self.metrics:
            self.metrics.write({"step": step, "eval": {name: vars(result) for name, result in results.items()}})
        if self.tensorboard:
            self.tensorboard.write(step, {f"eval/{name}": value for name, value in values.items()})
        for name, result in results.items():
            LOG.info("step %d · %s: %s", step, name, result)
        LOG.info("evaluation took %s", duration(time.perf_counter() - start))
        self._enter(TRAINING)

    def _analyze(self, probe: Probe) -> None:
        start = time.perf_counter()
        self._enter(EVALUATING)
        found = probe.measure(self.engine)
        seconds = time.perf_counter() - start
        step, every = self.state.step, self.config.analysis.interval
        share = seconds / (every * statistics.median(self._durations))
        if self.metrics:
            self.metrics.write({"step": step, "analysis": found, "seconds": seconds, "share_of_steps": share})
        if self.tensorboard:
            self.tensorboard.write(step, {f"analysis/{name}": value for name, value in found.items()})
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        LOG.info("step %d · inside: %s; %.2f s, %.1f %% of %d steps", step, numbers, seconds, 100 * share, every)
        self._enter(TRAINING)

    # --- end --------------------------------------------------------------------------------------------------------

    def _saved_step(self) -> int:
        found = latest_checkpoint(self.directory)
        return step_of(found) if found else 0

    def _save(self) -> None:
        """Every rank writes its share, or has its writing thread do so beside the next steps."""
        state = replace(
            self.state, optimizer_step=self.engine.state.optimizer_step, loss_scale=self.engine.loss_scale_state()
        )
        path, attempt = self.checkpoints / step_name(state.step), self.session.attempt
        self._complete_save()  # the one before, where threads take longer than checkpoint.interval
        self._enter(SAVING)
        if self.saver is not None:
            self.saver.begin(path, self.config, self.engine.state, state, attempt)
        else:
            save_distributed(path, self.config, self.engine.state, state, self.topology, attempt)
            self._publish_together(path)
        self._enter(TRAINING)

    def _complete_save(self) -> None:
        """Wait for the checkpoint that is being written beside training, if there is one, and publish it."""
        if self.saver is None or not self.saver.is_pending:
            return
        self._enter(SAVING)
        self._publish_together(self.saver.complete())
        self._enter(TRAINING)

    def _publish_together(self, path: Path) -> None:
        """``latest`` moves, and older checkpoints go; what fails on the main rank is raised on all."""
        failure: list[UserError | None] = [None]
        if self.topology.is_main:
            try:
                if self.metrics:
                    self.metrics.sync()  # after a power cut, too, it reaches to the step that the run goes on from
                self._publish(path, self.session.attempt)
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
        if (heartbeat := self.session.monitor.heartbeat) is not None:
            heartbeat.saved_step = step_of(path)
        attempt.check()
        keep = self.config.checkpoint.keep
        if self.saver is not None:
            self.saver.prune(self.checkpoints, keep)
        else:
            prune(self.checkpoints, keep)

    def _close(self) -> None:
        if self.saver is not None:
            self.saver.cancel()
        self.loader.close()
        for record in (self.display, self.tensorboard, self.metrics):
            if record is not None:
                record.close()


def describe_layout(config: RunConfig, topology: Topology) -> str:
    """The layout in a few words."""
    parts = [f"{topology.tensor_parallel_size} tensor"] if topology.tensor_parallel_size > 1 else []
    if config.parallel.sequence_parallel:
        parts[-1] += " + sequence"
    if topology.pipeline_parallel_size > 1:
        parts.append(f"{topology.pipeline_parallel_size} pipeline")
    parts.append(f"{topology.data_parallel_size} data")
    return f"{' × '.join(parts)}, ZeRO {zero_stage(config, topology.data_parallel_size)}, {config.train.precision}"
