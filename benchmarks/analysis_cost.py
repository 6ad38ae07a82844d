"""What one measurement of analysis.interval costs, in optimiser steps: pairs of a measurement and a step of one run.

python benchmarks/analysis_cost.py CONFIG [a.b=c …] --pairs 60

Its share of the time of training is the ratio over analysis.interval. CONFIG names training and held-out text
(configs/quickstart.yaml after `python tools/quickstart.py --data-only`). One process.
"""

import argparse
import itertools
import time

from paired import HEADER, measure, ratio

from megameta.cluster.launch import initialize_process_group, make_topology, pick_device
from megameta.engine.pipeline_engine import make_engine
from megameta.paper.analysis.training import AttentionProbe
from megameta.train.data import PretrainingData
from megameta.train.run_config import load_run_config


def main() -> None:
    """Print the ratios, an A/A row among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()
    config = load_run_config(arguments.config, arguments.overrides)
    topology = make_topology(pick_device(config.run.device))
    initialize_process_group(topology)
    data, probe = PretrainingData(config, topology), AttentionProbe(config, topology)
    engine, loader, numbers = make_engine(config, topology), data.loader(), itertools.count()

    def timed_step() -> float:
        batches = loader.read(next(numbers))
        start = time.perf_counter()
        engine.train_step(batches, 1e-4)
        return time.perf_counter() - start

    def timed_measurement() -> float:
        start = time.perf_counter()
        probe.measure(engine)
        return time.perf_counter() - start

    name = f"a measurement ({config.analysis.num_samples} sequences)"
    others = {name: timed_measurement, "a step (A/A)": timed_step}
    series = measure(timed_step, others, arguments.pairs)
    rows = [ratio(other, *series[other]) for other in others]
    print(HEADER)
    for row in rows:
        print(row.row())
    per_cent = [100 * value for value in (rows[0].median, rows[0].low, rows[0].high)]
    for interval in (100, 200, 500, 1000):
        shown = ", ".join(f"{value / interval:.2f}" for value in per_cent[1:])
        print(f"analysis.interval={interval}: {per_cent[0] / interval:.2f} % of the time of steps [{shown}]")
    loader.close()
    engine.destroy()


if __name__ == "__main__":
    main()
