"""``megameta generate``."""

import argparse

from megameta.commands.common import POLICY_HELP, Commands


def add_parser(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="continue prompts with a HuggingFace export")
    add = generate.add_argument
    add("source", metavar="EXPORT")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="<|meta|> in it is the meta-token; may be repeated",
    )
    add("--prompts-file", default=None, metavar="FILE", help="a prompt a line")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="slots to write, meta-tokens among them (100)")
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, metavar="K", help="0: all tokens (default)")
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt, when sampling")
    add("--meta-policy", default="given", choices=("none", "given", "every", "segments"), help=POLICY_HELP)
    add("--meta-every", type=int, default=10, metavar="N", help="of policy every: every N-th slot (10)")
    add("--show-meta", action="store_true", help="print meta-tokens too")
    add("--speed", action="store_true", help="print slots and text tokens a second")
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print continuations."""
    from megameta.cluster.launch import pick_device
    from megameta.hf.generation import Sampling, generate, read_prompts

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "num_samples")
    return generate(
        arguments.source,
        read_prompts(arguments.prompt, arguments.prompts_file),
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(**{name: getattr(arguments, name) for name in names}),
        policy=arguments.meta_policy,
        every=arguments.meta_every,
        show_meta=arguments.show_meta,
        speed=arguments.speed,
        device=pick_device("auto"),
    )
