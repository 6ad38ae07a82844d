"""``megameta tokenizer``: how a tokenizer cuts a text, id by id."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megameta.errors import UserError
from megameta.tokenizers.loading import load_tokenizer
from megameta.tokenizers.tokenizer import Tokenizer


def show(tokenizer_path: str, text: str | None, file: str | None, *, as_prompt: bool, as_json: bool, limit: int) -> int:
    """Print the tokens of a text and what they add up to.

    Args:
        text, file: one of the two; file "-": standard input.
        as_prompt: ``<|meta|>`` and ``<|endoftext|>`` are special tokens, as in prompts; else they are text, as in
            corpora.
        limit: tokens to list; 0: all.
    """
    if (text is None) == (file is None):
        raise UserError("give a text, or --file NAME (- for standard input)")
    content = text if text is not None else _read(str(file))
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode_prompt(content) if as_prompt else tokenizer.encode(content)
    record = _record(tokenizer, content, ids)
    try:
        if as_json:
            print(json.dumps(record, ensure_ascii=False))
        else:
            _print(tokenizer, tokenizer_path, record, limit)
        sys.stdout.flush()
    except BrokenPipeError:  # a pager that was left
        sys.stdout = None  # type: ignore[assignment]  # nothing more to flush at the end
    return 0


def _read(name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: invalid UTF-8 at byte {error.start}") from error


def _record(tokenizer: Tokenizer, text: str, ids: list[int]) -> dict[str, Any]:
    tokens, start = [], 0
    for index in ids:
        spelled = tokenizer.spelling(index)
        tokens.append({"id": index, "start": start, "bytes": spelled.hex(), "text": visible(spelled)})
        start += len(spelled)
    return {
        "tokens": tokens,
        "bytes": len(text.encode()),
        "round_trip": tokenizer.decode(ids) == text,
        "vocab_size": tokenizer.vocab_size,
        "document_end": tokenizer.eod_id,
        "meta_token": tokenizer.meta_token_id,
    }


def visible(spelled: bytes) -> str:
    """Bytes to read: spaces as ·, line ends and other invisible characters escaped, parts of a character in hex."""
    try:
        text = spelled.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"<{byte:02X}>" for byte in spelled)
    return "".join("·" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print(tokenizer: Tokenizer, path: str, record: dict[str, Any], limit: int) -> None:
    tokens = record["tokens"]
    table = Table(box=None, pad_edge=False)
    for column, justify in (("token", "right"), ("id", "right"), ("byte", "right"), ("text", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    special = (tokenizer.meta_token_id, tokenizer.eod_id)
    for number, token in enumerate(tokens[: limit or None]):
        style = "bold" if token["id"] in special else ""
        table.add_row(str(number), str(token["id"]), str(token["start"]), Text(token["text"], style=style))
    console = Console(highlight=False)
    console.print(table)
    if limit and len(tokens) > limit:
        console.print(f"… and {len(tokens) - limit:,} more (--limit 0: all)")
    count, size = len(tokens), record["bytes"]
    rate = f", {size / count:.3f} bytes a token" if count else ""
    outcome = "decodes to the same text" if record["round_trip"] else "decodes to ANOTHER text"
    console.print(f"{count:,} tokens, {size:,} bytes{rate}; {outcome}", soft_wrap=True)
    console.print(
        f"{path} ({tokenizer.kind}): {tokenizer.vocab_size:,} ids, document end {tokenizer.eod_id}, "
        f"meta-token {tokenizer.meta_token_id}",
        soft_wrap=True,
    )
