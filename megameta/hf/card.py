"""The model card (README.md) of an export."""

from collections.abc import Mapping, Sequence
from typing import Any

from megameta.model import ModelConfig

#: Keys of a card that go into its YAML header.
_HEADER_KEYS = ("license", "language", "datasets", "base_model")


def make_card(
    config: ModelConfig, card: Mapping[str, Any], *, stock: bool, num_parameters: int, dtype: str, has_tokenizer: bool
) -> str:
    """Markdown with a YAML header.

    Args:
        card: license, language, datasets and base_model go into the header, ``name`` is the title, ``limits`` are added
            to those that are known; every other entry becomes a section of that name: a mapping a table, a list bullet
            points, anything else a paragraph.
        stock: whether the export is transformers' own GPT-2.
    """
    import yaml

    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megameta", *([] if stock else ["custom_code", "meta-tokens"])],
    }
    header.update({key: card[key] for key in _HEADER_KEYS if key in card})
    title = str(card.get("name", "A model trained with megameta"))
    parts = [f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n", f"# {title}\n", _what_it_is(config, stock)]
    parts.append(f"{num_parameters / 1e6:.1f} M parameters, stored as {dtype}.\n")
    parts.append(_how_to_load(stock, has_tokenizer))
    for key, value in card.items():
        if key not in (*_HEADER_KEYS, "name", "limits"):
            parts.append(f"## {key.replace('_', ' ').capitalize()}\n\n{_section(value)}")
    values = {name: value for name, value in config.to_dict().items() if name != "attention_backend"}
    parts.append(f"## Configuration\n\n{_section(values)}")
    parts.append(_limits(config, stock, card.get("limits", [])))
    return "\n".join(parts)


def _what_it_is(config: ModelConfig, stock: bool) -> str:
    if stock:
        return (
            "A GPT-2 (transformers' own `GPT2LMHeadModel`), trained with megameta as the baseline without\n"
            "meta-attention.\n"
        )
    which = "Each block has"
    if config.meta_layers is not None:
        blocks = ", ".join(map(str, config.meta_layers))
        which = f"Block {blocks} has" if len(config.meta_layers) == 1 else f"Blocks {blocks}, counted from 0, have"
    branch = (
        f"{which} a second attention branch, the meta-attention, in which meta-tokens attend to meta-tokens\n"
        "alone; at every other position it adds exactly zero."
        if config.meta_attention
        else "This one has no meta-attention branch."
    )
    return (
        f"A causal language model with {config.num_layers} layers of width {config.hidden_size} and position encoding\n"
        f"`{config.position}`, in the manner of “Language Modeling with Learned Meta-Tokens” (arXiv 2509.16278).\n"
        f"{branch}\n"
    )


def _how_to_load(stock: bool, has_tokenizer: bool) -> str:
    remote = "" if stock else ", trust_remote_code=True"
    lines = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("PATH"{remote})')
    if has_tokenizer:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("PATH"{remote}, padding_side="left")',
            'batch = tokenizer(["Once upon a time"], return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20)))",
        ]
    code = "\n".join(lines)
    note = (
        "" if stock else "\n`modeling_megameta.py`, which is run on your machine, is the training model's own source.\n"
    )
    return f"## How to load it\n\n```python\n{code}\n```\n{note}"


def _limits(config: ModelConfig, stock: bool, more: Sequence[str]) -> str:
    lines = [
        f"- Trained on sequences of up to {config.max_position_embeddings} tokens.",
        f"- The meta-token (`<|meta|>`) has id {config.meta_token_id}; it is suppressed in generation."
        + (" Put it into prompts where the model was trained to see it." if config.meta_attention else ""),
        "- No claim is made about the truth or harmlessness of what it generates.",
    ]
    if not stock:
        lines.append("- Attention outputs, quantized and offloaded caches are not supported.")
    return "## Limits\n\n" + "\n".join([*lines, *(f"- {line}" for line in more)]) + "\n"


def _section(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = [f"| {_cell(name)} | {_cell(entry)} |" for name, entry in value.items()]
        return "\n".join(["| name | value |", "|---|---|", *rows, ""])
    if isinstance(value, list | tuple):
        return "\n".join(f"- {entry}" for entry in value) + "\n"
    return f"{value}\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        text = f"{value:,}"
    return text.replace("|", "\\|").replace("\n", " ")
