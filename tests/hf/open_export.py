"""Run in a process of its own: open an export where ``import megameta`` fails. Usage: DIR PROBE RESAVED.

PROBE holds ids, mask (left padding) and the expected logits without the mask; prints a dictionary of findings as JSON.
"""

import importlib.abc
import json
import sys


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "megameta":
            raise ImportError("megameta is blocked")
        return None


def train_three_steps(model, ids, mask) -> list[float]:
    """Losses of three steps, as transformers' Trainer makes them, with gradient checkpointing."""
    import torch

    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def generate_with_each_cache(model, batch) -> dict:
    """What a batch gives without a cache and with one that grows, has a fixed size, drops nothing, drops rows."""
    import torch

    def generate(**arguments):
        return model.generate(**batch, max_new_tokens=8, do_sample=False, **arguments)

    generated = generate()
    caches = (model.make_cache(100, sinks=0), model.make_cache(2))
    pruned = [generate(past_key_values=cache) for cache in caches]
    return {
        "left_padded": bool((batch["attention_mask"][1, 0] == 0).item()),
        "cache_agrees": torch.equal(generated, generate(use_cache=False)),
        "static_agrees": torch.equal(generated, generate(cache_implementation="static")),
        "pruned_agrees": torch.equal(generated, pruned[0]),
        "pruned_rows": caches[1].decoding.causal[0][0].shape[2],
    }


def main(directory: str, probe_file: str, resaved: str) -> dict:
    sys.meta_path.insert(0, Blocked())
    try:
        import megameta  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("megameta could be imported")

    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    probe = load_file(probe_file)
    ids, mask, expected = probe["ids"], probe["mask"], probe["logits"]
    found: dict = {}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    found["config"] = [type(config).__name__, config.num_hidden_layers, config.meta_token_id]
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    found["classes"] = [type(base).__name__, type(model).__name__]
    with torch.inference_mode():
        logits = model(ids).logits
        from_base = base(ids).last_hidden_state @ model.lm_head.weight.T
    found["error"] = float((logits - expected).abs().max() / expected.abs().max())
    found["base_error"] = float((from_base - expected).abs().max() / expected.abs().max())

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True, padding_side="left")
    found["ids"] = tokenizer("the<|meta|> sea")["input_ids"]
    found["pad"] = [tokenizer.pad_token_id, model.generation_config.pad_token_id]
    found |= generate_with_each_cache(
        model, tokenizer(["the old<|meta|> man", "sea"], padding=True, return_tensors="pt")
    )
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    found["generated_meta"] = int((greedy == config.meta_token_id).sum())
    free = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, suppress_tokens=[])
    found["generated_meta_unsuppressed"] = int((free[:, ids.shape[1] :] == config.meta_token_id).sum())

    collator = model.meta_token_collator(fraction=0.25, seed=5)
    slots = collator([{"input_ids": list(range(20, 44)), "index": 9}])["input_ids"][0]
    found["collated"] = [int((slots == config.meta_token_id).sum()), len(slots), collator.pad_token_id]

    found["losses"] = train_three_steps(model, ids, mask)

    model.eval()
    model.save_pretrained(resaved)
    again = AutoModelForCausalLM.from_pretrained(resaved, trust_remote_code=True)
    with torch.inference_mode():
        found["resaved_equal"] = torch.equal(again(ids).logits, model(ids).logits)
    found["resaved_suppresses"] = again.generation_config.suppress_tokens
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    found["fresh_std"] = float(fresh.model.blocks[0].mlp.down_proj.weight.std())
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
