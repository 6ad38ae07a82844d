"""The stages of the quickstart: text in, two trained models, their exports and a report out.

Everything runs from the root of the repository, which is the working directory.
"""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from megameta import __version__
from megameta.cluster.machine import machine_facts
from megameta.config import RunConfig, load_config
from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from megameta.files import write_text_atomically
from megameta.quickstart import claims, open_export
from megameta.quickstart.corpus import standard_library_documents, write_corpus
from megameta.quickstart.report import ModelResult, Results, plot_losses, render_report
from megameta.quickstart.stages import Commands, Stage, StageRunner, Stopped, shown
from megameta.train.metrics import read_metrics
from megameta.train.run_config import load_run_config

#: The two runs: name, configuration, what a person calls the model.
RUNS = (
    ("meta", "configs/quickstart.yaml", "with meta-attention"),
    ("twin", "configs/quickstart-twin.yaml", "twin without"),
)
DEFAULT_OUTPUT = Path("quickstart")


@dataclass(frozen=True)
class Options:
    """What a person can choose.

    Attributes:
        output: directory of everything that is made; the default, or an absolute path.
        margin: nats by which both models must beat the unigram entropy.
        corpus_bytes: of training text; None: all there is.
        overrides: ``a.b=c`` for both runs.
    """

    output: Path = DEFAULT_OUTPUT
    data_only: bool = False
    vocab_size: int = 4096
    corpus_bytes: int | None = None
    margin: float = 1.0
    overrides: tuple[str, ...] = ()


class Quickstart:
    """The whole line under one directory."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.output = options.output
        self.num_processes = count_processes(load_config(RUNS[0][1], list(options.overrides)).train.global_batch_size)
        self.commands = Commands({"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.output.absolute() / "hf-home")})
        self.stages = StageRunner(self.output, 3 if options.data_only else 8)
        self.shown: list[str] = []

    def run(self) -> int:
        """Run what is not done yet; returns an exit code.

        Raises:
            UserError: a command failed, or something that is claimed does not hold.
        """
        try:
            self._data()
            if self.options.data_only:
                print("\ndone. Next, for example:\n  megameta train configs/debug.yaml")
                return EXIT_OK
            self._train()
            self._export()
            return self._report()
        except Stopped:
            print("stopped; start it again to go on", flush=True)
            return EXIT_INTERRUPTED

    # --- stages -----------------------------------------------------------------------------------------------------

    def _data(self) -> None:
        data, tokenizer = self.output / "data", self.output / "tokenizer"
        files = {split: data / f"{split}.jsonl" for split in ("train", "valid")}
        inputs = [__version__, platform.python_version(), self.options.corpus_bytes]
        title = "corpus: topics, docstrings and sources of the standard library"
        self.stages.run(Stage("corpus", title, self._corpus, inputs, tuple(files.values())))
        train = ["tools/train_tokenizer.py", "--input", str(files["train"]), "--output", str(tokenizer)]
        train += ["--type", "bpe", "--vocab-size", str(self.options.vocab_size), "--overwrite"]
        self._run("tokenizer", "tokenizer: byte-level BPE", [train], [tokenizer])
        flags = ["--tokenizer", str(tokenizer), "--append-eod", "--overwrite"]
        encode = [
            ["tools/preprocess_data.py", "--input", str(file), "--output-prefix", str(data / split), *flags]
            for split, file in files.items()
        ]
        made = [data / f"{split}_text_document.{end}" for split in files for end in ("bin", "idx")]
        self._run("preprocess", "preprocess: text to .bin and .idx", encode, made)

    def _corpus(self) -> None:
        size = write_corpus(self.output / "data", standard_library_documents(), self.options.corpus_bytes)
        for split, count in size.documents.items():
            print(f"{split}: {count:,} documents, {size.bytes[split] / 1e6:.2f} MB", flush=True)

    def _train(self) -> None:
        for name, path, title in RUNS:
            command = ["-m", "megameta", "train", path, "--nproc-per-node", str(self.num_processes)]
            command += self.overrides(name)
            inputs = self.config(name).to_dict()
            self._run(f"train-{name}", f"train the model {title}", [command], [self.run_dir(name)], inputs)

    def _export(self) -> None:
        exports = [self.output / "hf" / name for name, _, _ in RUNS]
        convert = [
            ["tools/convert_checkpoint.py", "to-hf", str(self.run_dir(name)), "--output", str(export), "--overwrite"]
            for (name, _, _), export in zip(RUNS, exports, strict=True)
        ]
        self._run("convert", "convert both to HuggingFace", convert, exports)
        samples = self.output / "samples.json"
        # -I: neither the working directory nor the user's own settings on the path.
        command = ["-I", _relative(open_export.__file__), "--output", str(samples)]
        command += ["--seed", str(self.config("meta").run.seed), *map(str, exports)]
        title = "open both where megameta cannot be imported, and generate"
        self._run("generate", title, [command], [samples])

    def _run(
        self, name: str, title: str, commands: list[list[str]], outputs: list[Path], inputs: object = None
    ) -> None:
        def work() -> None:
            for command in commands:
                self.commands.python(*command)

        self.shown += [shown(command) for command in commands]
        self.stages.run(Stage(name, title, work, [commands, inputs], tuple(outputs)))

    def _report(self) -> int:
        self.stages.header("check what is claimed, and report")
        results = self._results()
        report, curves = self.output / "report.md", self.output / "loss.png"
        plot_losses(results, curves)
        write_text_atomically(report, render_report(results))
        for claim in results.claims:
            print(f"{'ok' if claim.holds else 'FAILED'}: {claim.text}")
        print(f"\nreport: {report}, curves: {curves}", flush=True)
        failed = [claim.text for claim in results.claims if not claim.holds]
        if failed:
            raise UserError("\n  ".join([f"{len(failed)} of {len(results.claims)} claims do not hold:", *failed]))
        return EXIT_OK

    # --- numbers ----------------------------------------------------------------------------------------------------

    def _results(self) -> Results:
        opened = json.loads((self.output / "samples.json").read_text(encoding="utf-8"))
        models = {}
        for (name, _, title), export in zip(RUNS, opened["models"], strict=True):
            config, run_dir = self.config(name), self.run_dir(name)
            evaluation = claims.final_evaluation(run_dir, config.train.num_steps)
            records = read_metrics(run_dir / "metrics.jsonl")
            models[name] = ModelResult(title, config, records, evaluation, export["class"], export["samples"])
        targets = claims.evaluated_targets(self.config("meta"))
        entropy = claims.unigram_entropy(targets)
        counts = [result["targets"] for model in models.values() for result in model.evaluation.values()]
        made = [
            *claims.loss_claims(
                {m.title: m.evaluation["valid"]["loss"] for m in models.values()}, entropy, self.margin
            ),
            claims.same_targets_claim([len(targets), *counts]),
            claims.branch_claim(claims.branch_movement(self.run_dir("meta"))),
            claims.Claim(f"both exports opened and generated where `import megameta` gives {opened['blocked']}", True),
        ]
        command = shown(["tools/quickstart.py", *sys.argv[1:]])
        facts = machine_facts() | {"processes": str(self.num_processes), "seed": str(self.config("meta").run.seed)}
        return Results(facts, models, entropy, made, self.stages.times, [command, *self.shown], self.output)

    @property
    def margin(self) -> float:
        """Nats by which both models must beat the unigram entropy."""
        return self.options.margin

    # --- runs -------------------------------------------------------------------------------------------------------

    def overrides(self, name: str) -> list[str]:
        """What the configuration file of a run does not say."""
        found = []
        if self.output != DEFAULT_OUTPUT:
            data = self.output / "data"
            found = [f"run.dir={self.output / 'runs' / name}", f"data.tokenizer={self.output / 'tokenizer'}"]
            found += [f"data.{split}={data / f'{split}_text_document'}" for split in ("train", "valid")]
        if self.num_processes > 2:
            batch = load_config(RUNS[0][1], list(self.options.overrides)).train.global_batch_size
            found.append(f"train.micro_batch_size={max(1, min(8, batch // self.num_processes))}")
        return [*found, *self.options.overrides]

    def config(self, name: str) -> RunConfig:
        """The resolved configuration of a run; its tokenizer must be there."""
        path = next(path for run, path, _ in RUNS if run == name)
        return load_run_config(path, self.overrides(name))

    def run_dir(self, name: str) -> Path:
        """The directory of a run."""
        return Path(self.config(name).run.dir)


def _relative(path: str) -> str:
    """A path as short as the working directory allows."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def count_processes(global_batch_size: int) -> int:
    """Two processes on a CPU; else one a GPU, as many of them as divide the batch."""
    if not torch.cuda.is_available():
        return 2
    return max(n for n in range(1, torch.cuda.device_count() + 1) if global_batch_size % n == 0)
