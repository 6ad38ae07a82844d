"""``megameta generate``: a batch of prompts under a policy for meta-tokens."""

from pathlib import Path

import pytest
import torch

from megameta.__main__ import build_parser
from megameta.errors import UserError
from megameta.hf.export import export_to_hf
from megameta.model import GPT
from tests.support.exports import small_tokenizer, tokenizer_config
from tests.support.models import small_model

PROMPTS = ["the old man", "the sea<|meta|> and the old man and"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer)
    model = small_model(config, torch.float32, vocab_multiple=1, seed=5).eval()
    directory = tmp_path_factory.mktemp("export") / "hf"
    export_to_hf(config, {name: p.detach() for name, p in model.named_parameters()}, directory, tokenizer=tokenizer)
    return directory, model


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What stands behind each "--- n"."""
    parsed = build_parser().parse_args(["generate", *arguments])
    assert parsed.run(parsed) == 0
    return [part.split("\n", 1)[1].rstrip("\n") for part in capsys.readouterr().out.split("--- ")[1:]]


def continued(model: GPT, ids: list[int], count: int, every: int | None) -> list[int]:
    """Greedy, slot by slot, without a cache: the meta-token in every ``every``-th slot, nowhere else."""
    meta, eod = model.config.meta_token_id, small_tokenizer().eod_id
    for _ in range(count):
        if every is not None and len(ids) % every == every - 1:
            ids = [*ids, meta]
            continue
        with torch.no_grad():
            logits_V = model(torch.tensor([ids]))[0, -1]
        logits_V[meta] = -torch.inf
        ids = [*ids, int(logits_V.argmax())]
        if ids[-1] == eod:
            return ids[:-1]
    return ids


@pytest.mark.parametrize("every", [None, 3])
def test_a_batch_reads_as_each_prompt_alone(
    every: int | None, export: tuple[Path, GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, model = export
    tokenizer = small_tokenizer()
    policy = ["--meta-policy", "given"] if every is None else ["--meta-policy", "every", "--meta-every", str(every)]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    found = run(capsys, str(directory), *prompts, "--max-new-tokens", "9", "--show-meta", *policy)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tokenizer.encode_prompt(prompt)
        if every is not None:
            plain, ids = [token for token in ids if token != tokenizer.meta_token_id], []
            for token in plain:
                ids.append(token)
                if len(ids) % every == every - 1:
                    ids.append(tokenizer.meta_token_id)
        assert text == tokenizer.decode(continued(model, ids, 9, every))


def test_prompts_from_a_file_and_samples(
    export: tuple[Path, GPT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the old\nthe sea and\n")
    options = ["--prompts-file", str(tmp_path / "prompts.txt"), "--temperature", "1", "--num-samples", "2", "--speed"]
    found = run(capsys, str(export[0]), *options, "--max-new-tokens", "6", "--top-k", "20", "--seed", "4")
    assert [text.split("\n")[0][:7] for text in found] == ["the old", "the old", "the sea", "the sea"]
    assert "text tokens/s" in found[-1]
    again = run(capsys, str(export[0]), *options, "--max-new-tokens", "6", "--top-k", "20", "--seed", "4")
    assert found[:3] == again[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a --prompt"),
        (["--prompt", "a", "--num-samples", "2"], "needs --temperature"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--meta-policy", "every", "--meta-every", "1"], "at least 2"),
        (["--prompts-file", "nowhere.txt"], "no such file"),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], message: str, export: tuple[Path, GPT]) -> None:
    parsed = build_parser().parse_args(["generate", str(export[0]), *options])
    with pytest.raises(UserError, match=message):
        parsed.run(parsed)
