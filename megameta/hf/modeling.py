"""The HuggingFace classes around the training model's own modules; ``megameta.hf.bundle`` copies them into exports.

Names of weights, export ← training model: ``model.embedding.*`` ← ``embedding.*``, ``model.blocks.*`` ← ``blocks.*``,
``model.norm.*`` ← ``head.norm.*``, ``lm_head.weight`` ← ``head.output.weight`` (absent where embeddings are tied).

Letters: B batch, T rows of this pass, S rows with those in the cache, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as hf_init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from megameta.hf.cache import MegametaCache, as_megameta_cache
from megameta.hf.collator import MetaTokenCollator
from megameta.hf.configuration import MegametaConfig
from megameta.model.context import make_context
from megameta.model.gpt import Block, Embedding, make_norm
from megameta.model.loss import IGNORE_INDEX, cross_entropy_sum
from megameta.model.pruning import KeepRule


class MegametaPreTrainedModel(PreTrainedModel):
    """Initial weights, loading and saving."""

    config_class = MegametaConfig
    config: MegametaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2 initialisation, as in training (spec §2), though drawn from torch's global generator."""
        super()._init_weights(module)
        std = getattr(module, "initial_std", None)
        if std is not None and isinstance(module, nn.Linear):
            hf_init.normal_(module.weight, mean=0.0, std=std)


class MegametaModel(MegametaPreTrainedModel):
    """Token ids to the hidden states after the final norm."""

    def __init__(self, config: MegametaConfig) -> None:
        super().__init__(config)
        backend: Literal["sdpa", "flash"] = "flash" if config._attn_implementation == "flash_attention_2" else "sdpa"
        self.model_config = config.to_model_config(backend)
        self.embedding = Embedding(self.model_config, vocab_multiple=1)
        self.blocks = nn.ModuleList(Block(self.model_config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(self.model_config)
        # Marked one by one: in remote code transformers does not visit modules that have no parameters of their own.
        adds = self.model_config.num_residual_adds
        for name, module in self.blocks.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.initial_std = config.initializer_range / math.sqrt(adds)  # type: ignore[assignment]
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embedding.tokens = value  # type: ignore[assignment]  # PEFT passes wrappers

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_meta_columns: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """(B, T) ids to (B, T, D); meta-tokens are ids like any other.

        Args:
            attention_mask: (B, S), 0 at padding, on either side; rows of padding are never attended to, nor are they
                meta-tokens, whatever their id.
            position_ids: (B or 1, T); counted over rows that are not padding where absent.
            output_hidden_states: also return the embeddings and each block's output, the last after the final norm.
            num_meta_columns: at least the largest number of meta-tokens in a sequence, where the caller knows it:
                spares a wait for the device, and a compiled pass an interruption.

        Raises:
            ValueError: an argument that is not supported; the message says what is.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("pass input_ids, not inputs_embeds: the meta branch needs to know the meta-tokens")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: the kernels do not return attention weights")
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = as_megameta_cache(past_key_values) if (use_cache or past_key_values is not None) else None
        if checkpointing:
            cache = None  # a block that runs twice would append its rows twice
        past = cache.get_seq_length() if cache is not None else 0
        token_BT, position_BT, document_BT = self._rows(input_ids, attention_mask, position_ids, past)
        decoding = cache.decoding if cache is not None else None
        context = make_context(
            self.model_config,
            token_BT,
            position_BT=position_BT,
            document_BT=document_BT,
            num_meta_columns=num_meta_columns,
            cache=decoding,
        )
        x_BTD = self.embedding(token_BT, context)
        hidden: list[Tensor] = []
        run: Callable[..., Tensor]
        for block in self.blocks:
            hidden.append(x_BTD) if keep_all else None
            run = partial(self._gradient_checkpointing_func, block.__call__) if checkpointing else block
            x_BTD = run(x_BTD, context, decoding)
        x_BTD = self.norm(x_BTD)
        states = (*hidden, x_BTD) if keep_all else None
        return BaseModelOutputWithPast(x_BTD, past_key_values=cache if use_cache else None, hidden_states=states)

    def _rows(
        self, token_BT: Tensor, mask_BS: Tensor | None, position_BT: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token ids, positions and documents (0 real, −1 padding; None without padding) of the new rows."""
        length, config = token_BT.shape[1], self.model_config
        document_BT = None
        if mask_BS is not None:
            if mask_BS.ndim != 2 or mask_BS.shape[1] != past + length:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask_BS.shape)}, but a mask over the {past} rows of the cache"
                    f" and the {length} new ones is needed: ({token_BT.shape[0]}, {past + length})"
                )
            if not mask_BS.all():  # a mask of ones costs the fast causal kernel, so it is dropped
                is_real_BT = mask_BS[:, -length:].bool()
                document_BT = torch.where(is_real_BT, 0, -1)
                token_BT = token_BT.masked_fill(~is_real_BT, 0 if config.meta_token_id else 1)
                if position_BT is None:
                    position_BT = (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        limit = config.max_position_embeddings
        # A cache of fixed size counts in a tensor, and its length was checked when it was made.
        too_long = config.position == "ape" and not isinstance(past, Tensor) and past + length > limit
        if too_long and (position_BT is None or int(position_BT.max()) >= limit):
            raise ValueError(f"a sequence of {past + length} rows exceeds this model's {limit} learned positions")
        return token_BT, position_BT, document_BT


class MegametaForCausalLM(MegametaPreTrainedModel, GenerationMixin):
    """The language model. Generation settings, the suppressed meta-token among them: generation_config.json."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegametaConfig) -> None:
        super().__init__(config)
        self.model = MegametaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def meta_token_collator(self, **options: Any) -> MetaTokenCollator:
        """A data collator for training this model, which injects its meta-token; ``options``: of the collator."""
        config, ids = self.config, self.generation_config or self.config
        pad_id = next((i for i in (ids.pad_token_id, ids.eos_token_id) if isinstance(i, int)), 0)
        options.setdefault("pad_token_id", pad_id)
        if config.position == "ape":
            options.setdefault("max_length", config.max_position_embeddings)
        return MetaTokenCollator(config.meta_token_id, **options)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to the vocabulary."""
        self.lm_head = new_embeddings

    def make_cache(self, window: int, **rule: Any) -> MegametaCache:
        """A cache that keeps the newest ``window`` rows, the first few and the meta-tokens', and frees the others:
        ``model.generate(ids, past_key_values=model.make_cache(256))``. The arguments are those of ``KeepRule``.
        """
        return MegametaCache(KeepRule(window, **rule))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """(B, T) ids to logits (B, T, V). The arguments are those of ``MegametaModel`` and these.

        Args:
            labels: (B, T) ids, shifted in here: labels[:, t] is the target of row t − 1. Targets that are −100, the
                meta-token, or padding have no loss (spec §1).
            logits_to_keep: only the last so many rows' logits (0: all), or those of these rows.
            num_items_in_batch: divides the sum of the losses, in place of the number of valid targets here.
        """
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            if logits_BTV.shape[1] != labels.shape[1]:
                raise ValueError("a loss needs the logits of every row: leave logits_to_keep at 0")
            loss = self._loss(logits_BTV, labels.to(logits_BTV.device), attention_mask, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _loss(
        self, logits_BTV: Tensor, label_BT: Tensor, mask_BT: Tensor | None, num_items: int | Tensor | None
    ) -> Tensor:
        target_BT = label_BT[:, 1:].masked_fill(label_BT[:, 1:] == self.config.meta_token_id, IGNORE_INDEX)
        if mask_BT is not None:  # neither what padding predicts nor what predicts padding
            is_real_BT = (mask_BT[:, 1:] * mask_BT[:, :-1]).bool()
            target_BT = target_BT.masked_fill(~is_real_BT, IGNORE_INDEX)
        count = (target_BT != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
        if isinstance(count, Tensor):
            count = count.to(logits_BTV.device)
        return cross_entropy_sum(logits_BTV[:, :-1], target_BT) / count

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: the model makes those of its two branches itself."""
        return attention_mask

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in every model; what a pass over a cache of fixed size gets besides has one shape in all steps.

        Its mask is left out where the new rows are no padding (the cache knows of older padding), and the number of
        meta-tokens is found here, outside of what is compiled: a step that has none does not compute the branch.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc] # self is no mixin's
        cache = inputs.get("past_key_values")
        if isinstance(cache, MegametaCache) and cache.is_compileable and cache.is_initialized:
            token_BT, mask_BS = inputs["input_ids"], inputs.get("attention_mask")
            if mask_BS is not None and bool(mask_BS[:, -token_BT.shape[1] :].all()):
                inputs["attention_mask"] = None
            inputs["num_meta_columns"] = int((token_BT == self.config.meta_token_id).sum(dim=1).max())
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override] # its other arguments change between versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """``generate`` makes a cache of transformers; here it gets a MegametaCache."""
        asked, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if asked not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={asked!r} is not supported: the meta branch keeps rows of its own. Leave it"
                " unset, or choose 'dynamic' or 'static'"
            )
        if generation_config.use_cache is False and given is None:
            return
        if asked == "static":
            if given is not None:
                raise ValueError("pass cache_implementation='static' or past_key_values, not both")
            cache = self._fixed_cache(generation_config, model_kwargs)
        else:
            cache = as_megameta_cache(given)
        room, rows = cache.get_max_length(), generation_config.max_length - 1
        if 0 < room < rows:
            raise ValueError(
                f"the cache has room for {room} rows, but up to {rows} are to be written: give max_cache_len when it is"
                " made"
            )
        cache._is_user_defined = given is not None  # type: ignore[attr-defined]
        model_kwargs["past_key_values"] = cache

    def _fixed_cache(self, generation_config: Any, model_kwargs: dict[str, Any]) -> MegametaCache:
        """Room for a whole generation (the last token has no row), or for ``max_cache_len`` if that is more."""
        config, rows = self.model.model_config, generation_config.max_length - 1
        positions = model_kwargs.get("position_ids")
        if config.position == "ape" and positions is not None:
            last = int(positions[..., -1].max()) + rows - positions.shape[-1]
            if last >= config.max_position_embeddings:
                raise ValueError(
                    f"a sequence of up to {last + 1} rows exceeds this model's {config.max_position_embeddings} learned"
                    " positions, and a cache of fixed size is made for all of it: ask for fewer new tokens"
                )
        rows = max(rows, generation_config.max_cache_len or 0)
        return MegametaCache(max_rows=rows, num_meta_layers=config.count_meta_layers())
