"""The training run: steps, evaluations, checkpoints, and an exact resume."""

import math
import time
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
)
from megameta.cluster.heartbeat import EVALUATING, FAILED, PHASE_OF, TRAINING
from megameta.cluster.machine import measure_peak_flops
from megameta.cluster.session import RunSession, open_run
from megameta.cluster.stop import StopRequest
from megameta.config import RunConfig, step_flops, zero_stage
from megameta.data.counter_random import make_key
from megameta.data.loader import next_batch_number
from megameta.engine import (
    NonFiniteGradient,
    NonFiniteLoss,
    check_replicas,
    initial_weights,
    make_engine,
    settle_on,
)
from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from megameta.log import LOG
from megameta.model import Attention
from megameta.parallel.topology import Topology
from megameta.train.data import MakeProbe, PretrainingData, Probe, RunData
from megameta.train.recording import RunRecords
from megameta.train.saving import RunCheckpoints
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
        self.state = TrainerState(step=0, next_batch=0, tokens=0, targets=0, optimizer_step=0)
        weights = checkpoint.weights() if checkpoint else initial_weights(config, topology)
        self.engine = make_engine(config, topology, weights)
        if checkpoint:
            self.state = checkpoint.trainer()
            self.engine.state.load_moments(checkpoint.moments(), self.state.optimizer_step)
            self.engine.load_loss_scale(self.state.loss_scale)
        self.session.monitor.groups = {
            "world": dist.group.WORLD,
            "data": self.engine.groups.data,
            "tensor": self.engine.groups.layers.group,
        }
        self.engine.flags = self._flags
        self._describe(checkpoint)
        self.records = RunRecords(config, self.session, self.state.step, is_main=topology.is_main)
        self.checkpoints = RunCheckpoints(config, topology, self.session, self.engine, self.records)

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
        self.records.begin(self.state.step)
        self.session.enter(TRAINING)
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
                self.checkpoints.complete()
            if last or stopping or step % config.checkpoint.interval == 0:
                self.checkpoints.save(self.state)
            if last or stopping:
                self.checkpoints.complete()
            if stopping and not last:
                LOG.info("stopped by a signal after step %d; saved; start it again to go on", step)
                return EXIT_INTERRUPTED
        LOG.info("done: %d steps, checkpoint %s", self.state.step, self.checkpoints.path(self.state.step))
        LOG.info("next: python tools/convert_checkpoint.py to-hf %s --output DIR", config.run.dir)
        return EXIT_OK

    def _flags(self) -> tuple[bool, bool]:
        """Whether this rank is asked to stop, and whether its thread is writing."""
        return self.stop.requested, self.checkpoints.is_writing

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
                self.checkpoints.complete()
            updated = isinstance(error, NonFiniteGradient) and error.updated
            untouched = "" if updated else "Nothing was updated; "
            saved = self.checkpoints.latest_step()
            raise UserError(
                f"step {step}, batch {batch_number}: {error}. {untouched}the last checkpoint is that of step {saved}."
                f" Look at the samples, or pass over them with data.skip=[[{batch_number}, {following}]]"
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
        self.records.step(record, seconds, slots)

    def _evaluate(self, sets: list[str]) -> None:
        start = time.perf_counter()
        self.session.enter(EVALUATING)
        results = self.data.evaluator.run(self.engine, sets)
        self.records.evaluation(self.state.step, results, time.perf_counter() - start)
        self.session.enter(TRAINING)

    def _analyze(self, probe: Probe) -> None:
        start = time.perf_counter()
        self.session.enter(EVALUATING)
        found = probe.measure(self.engine)
        self.records.analysis(self.state.step, found, time.perf_counter() - start)
        self.session.enter(TRAINING)

    def _close(self) -> None:
        self.checkpoints.close()
        self.loader.close()
        self.records.close()


def describe_layout(config: RunConfig, topology: Topology) -> str:
    """The layout in a few words."""
    parts = [f"{topology.tensor_parallel_size} tensor"] if topology.tensor_parallel_size > 1 else []
    if config.parallel.sequence_parallel:
        parts[-1] += " + sequence"
    if topology.pipeline_parallel_size > 1:
        parts.append(f"{topology.pipeline_parallel_size} pipeline")
    parts.append(f"{topology.data_parallel_size} data")
    return f"{' × '.join(parts)}, ZeRO {zero_stage(config, topology.data_parallel_size)}, {config.train.precision}"
