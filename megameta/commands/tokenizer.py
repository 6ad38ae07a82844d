"""``megameta tokenizer show``."""

import argparse

from megameta.commands.common import Commands


def add_parser(commands: Commands) -> None:
    tokenizer = commands.add_parser("tokenizer", help="show how a tokenizer cuts a text")
    parts = tokenizer.add_subparsers(dest="part", required=True, metavar="PART")
    show = parts.add_parser("show", help="print the tokens of a text: id, place, bytes")
    show.add_argument("text", metavar="TEXT", nargs="?", help="the text, or --file")
    show.add_argument("--tokenizer", required=True, metavar="PATH", help="directory, tokenizer.json or .model")
    show.add_argument("--file", metavar="FILE", help="a text file; -: standard input")
    show.add_argument("--prompt", action="store_true", help="take <|meta|> and <|endoftext|> for special tokens")
    show.add_argument("--limit", type=int, default=200, metavar="N", help="tokens to list (200; 0: all)")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tokens."""
    from megameta.tokenizers.show import show

    options = {"as_prompt": arguments.prompt, "as_json": arguments.json, "limit": arguments.limit}
    return show(arguments.tokenizer, arguments.text, arguments.file, **options)
