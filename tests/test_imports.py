"""What a start imports: seconds that every command and every rank of a run spends before it does anything."""

import sys
import textwrap

import pytest
import yaml

import megameta.model
from megameta.engine.engine import import_deepspeed
from tests.support.commands import true_process
from tests.support.ranks import run_ranks
from tests.support.training import tiny_values

#: What commands import that read configurations, logs or text, and compute nothing.
WITHOUT_TORCH = [
    "megameta.__main__",
    "megameta.config",
    "megameta.model.config",
    "megameta.config.validate",
    "megameta.train.run_config",
    "megameta.cluster.slurm.fit",
    "megameta.cluster.slurm.supervise",
    "megameta.cluster.status",
    "megameta.tokenizers.show",
    "megameta.corpus.preprocess",
    "megameta.corpus.train_tokenizer",
    "megameta.corpus.inspect_dataset",
]


def loaded(code: str, *arguments: str) -> list[str]:
    """What a new interpreter prints while it imports."""
    command = [sys.executable, "-c", f"import importlib, sys\n{textwrap.dedent(code)}", *arguments]
    done = true_process(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_computes_nothing_needs_no_torch():
    code = """
    for name in sys.argv[1:]:
        importlib.import_module(name)
        print(name, "torch" in sys.modules)
    from megameta.model import ModelConfig
    print("ModelConfig", "torch" in sys.modules)
    from megameta.model import GPT
    print("GPT", "torch" in sys.modules)
    """
    expected = [f"{name} False" for name in [*WITHOUT_TORCH, "ModelConfig"]] + ["GPT True"]
    assert loaded(code, *WITHOUT_TORCH) == expected


def test_shapes_need_no_compiler(tmp_path):
    """A configuration is checked for eight GPUs in two pipeline stages of two shards."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_values(str(tmp_path / "text"))))
    code = """
    from megameta.__main__ import main
    try:
        main(sys.argv[1:])
    finally:
        print("torch" in sys.modules, "torch._dynamo" in sys.modules)
    """
    parallel = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]
    said = loaded(code, "config", "check", str(tmp_path / "run.yaml"), *parallel, "--gpus", "8")
    assert any("8 ranks = pipeline 2 × data 2 × tensor 2" in line for line in said)
    assert said[-1] == "True False"


def test_names_of_the_model_are_there():
    assert set(megameta.model.__all__) <= set(dir(megameta.model))
    for name in megameta.model.__all__:
        value = getattr(megameta.model, name)
        assert getattr(value, "__module__", "megameta.model").startswith("megameta.model")
    with pytest.raises(AttributeError, match=r"'megameta\.model' has no attribute 'GPT2'"):
        megameta.model.GPT2  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GPT2'"):
        from megameta.model import GPT2  # noqa: F401


def _compiled_muon(topology):
    import_deepspeed(topology)
    muon = vars(sys.modules["deepspeed.runtime.zero.muon.original_muon"])
    assert callable(muon["zeropower_via_newtonschulz5"])
    return [name for name, value in muon.items() if hasattr(value, "_torchdynamo_orig_callable")]


def test_deepspeed_s_muon_is_not_compiled():
    assert run_ranks(_compiled_muon, 1) == [[]]
