"""``megameta generate``: text from a HuggingFace export, by the package's own classes (no code of the export runs)."""

import torch

from megameta.data.tokenizer import load_tokenizer
from megameta.hf.load import load_causal_lm
from megameta.parallel.launch import pick_device


def generate(
    source: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, num_samples: int
) -> int:
    """Print the prompt and its continuations; temperature 0 is greedy. ``<|meta|>`` in the prompt is the meta-token."""
    device = pick_device("auto")
    model = load_causal_lm(source).to(device)
    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eod_id]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    tokens = torch.tensor([ids], device=device)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples if temperature > 0 else 1,
        **sampling,
    )
    for number, row in enumerate(output.tolist(), 1):
        if len(output) > 1:
            print(f"--- {number}")
        print(tokenizer.decode(row))
    return 0
