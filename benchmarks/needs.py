"""Names every package that benchmarks/gpu.py needs and this Python lacks, at once; exit code 1 where one is missing.

    python benchmarks/needs.py

An installed package says itself what it needs; of one that is missing a table tells.
"""

import importlib.metadata
import re
import sys

#: What the parts import. torch brings the rest.
ROOTS = (
    *("accelerate", "deepspeed", "numpy", "pydantic", "pytest", "pyyaml"),
    *("safetensors", "tokenizers", "transformers"),
)
#: What the tested versions need in turn (constraints.txt); those that are not here need nothing.
REQUIRES = {
    "accelerate": "huggingface-hub numpy packaging psutil pyyaml safetensors torch",
    "anyio": "idna typing-extensions",
    "deepspeed": "einops hjson msgpack ninja numpy packaging psutil py-cpuinfo pydantic torch tqdm",
    "httpcore2": "h11 truststore",
    "httpx2": "anyio httpcore2 idna truststore typing-extensions",
    "huggingface-hub": "click filelock fsspec hf-xet httpx2 packaging pyyaml tqdm typing-extensions",
    "markdown-it-py": "mdurl",
    "pydantic": "annotated-types pydantic-core typing-extensions typing-inspection",
    "pydantic-core": "typing-extensions",
    "pytest": "iniconfig packaging pluggy pygments",
    "rich": "markdown-it-py pygments",
    "tokenizers": "huggingface-hub",
    "transformers": "huggingface-hub numpy packaging pyyaml regex safetensors tokenizers tqdm typer",
    "typer": "annotated-doc pydantic rich shellingham",
    "typing-inspection": "typing-extensions",
}


def requirements(name: str) -> list[str]:
    """What a package needs, by normal names.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    lines = importlib.metadata.requires(name) or []
    try:
        from packaging.requirements import Requirement
    except ImportError:  # is needed itself, and will be named
        return REQUIRES.get(name, "").split()
    parsed = [Requirement(line) for line in lines]
    needed = [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted({re.sub(r"[-_.]+", "-", needs).lower() for needs in needed})


def missing() -> list[str]:
    """What is not installed of ROOTS and of all that they need."""
    seen: set[str] = set()
    lacking, waiting = [], list(ROOTS)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
            waiting += REQUIRES.get(name, "").split()
        else:
            waiting += [] if name == "torch" else requirements(name)
    return sorted(lacking)


def main() -> int:
    """Print what is missing, and the remedy."""
    lacking = missing()
    if lacking:
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        print(
            f"error: missing packages: {', '.join(lacking)}; install them, or put their wheels (for {tag}, or py3)"
            " into a folder and name it with --wheels",
            file=sys.stderr,
        )
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
