"""What is analysed: a model in one process, and the held-out text that it is looked at with.

Letters: B batch, T slots of a sequence with its meta-tokens, L = T − M of them text, D model width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from megameta.config import RunConfig
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.loader import Batch, collate
from megameta.data.samples import Samples
from megameta.data.sources import TEST, held_out_samples
from megameta.engine.build import build_model
from megameta.errors import UserError
from megameta.model import GPT, Context, make_context
from megameta.tokenizers import Tokenizer, load_tokenizer
from megameta.train.evaluation import evenly_spread


@dataclass(frozen=True)
class Subject:
    """A model and its held-out text.

    Attributes:
        name: what the reader calls it (the path that was given).
        config: its configuration, overrides in it.
        model: the plain float32 GPT in eval mode on its device.
        tokenizer: None where the configuration names none.
        set_name: which held-out set is read.
        samples: the set's windows of L text tokens in the order on disk; a twin reads the same ones.
        form: how a window becomes a sequence; holds no meta-tokens where the model was trained without.
        twin: a model to stand beside this one, on the same text.
    """

    name: str
    config: RunConfig
    model: GPT
    tokenizer: Tokenizer | None
    set_name: str
    samples: Samples
    form: SampleFormat
    twin: "Subject | None" = None

    @classmethod
    def of(cls, name: str, config: RunConfig, weights: Mapping[str, Tensor], device: str) -> "Subject":
        """From a configuration and weights by canonical name (``megameta.train.offline.load_source``).

        Raises:
            UserError: no held-out set is named, or the weights are those of another model.
        """
        sets = {key: found for key, found in held_out_samples(config).items() if key.partition("/")[0] != TEST}
        if not sets:
            raise UserError("no held-out set is named: give --data PREFIX, or data.valid=PREFIX")
        set_name, samples = next(iter(sets.items()))
        form = SampleFormat.of(config.data, config.model.meta_token_id, config.run.seed, config.model.vocab_size)
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
        model = build_model(config, weights).to(device).eval().requires_grad_(False)
        return cls(name, config, model, tokenizer, set_name, samples, replace(form, skip_first_target=True))

    def with_twin(self, name: str, config: RunConfig, weights: Mapping[str, Tensor]) -> "Subject":
        """This subject beside another model, which reads this one's text: with meta-tokens at the same places if it was
        trained with some, else without.

        Raises:
            UserError: it has another vocabulary, or a window that the text does not fit into.
        """
        model, ours = config.model, self.config.model
        count = self.form.num_meta_tokens if config.data.num_meta_tokens else 0
        length = self.form.text_per_sample + count
        if model.vocab_size != ours.vocab_size or (count and model.meta_token_id != ours.meta_token_id):
            raise UserError(
                f"{name} has {model.vocab_size:,} tokens in its vocabulary and meta-token {model.meta_token_id},"
                f" {self.name} has {ours.vocab_size:,} and {ours.meta_token_id}: a twin reads the same tokens"
            )
        if model.position == "ape" and model.max_position_embeddings < length:
            raise UserError(
                f"{name} has learned positions up to {model.max_position_embeddings}, and the same text takes"
                f" {length}: give data.sequence_length={model.max_position_embeddings} or less"
            )
        gpt = build_model(config, weights).to(self.device).eval().requires_grad_(False)
        form = replace(self.form, num_meta_tokens=count)
        return replace(self, twin=replace(self, name=name, config=config, model=gpt, form=form, twin=None))

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.model.embedding.tokens.weight.device)

    @property
    def has_meta_tokens(self) -> bool:
        """Whether sequences hold meta-tokens."""
        return self.form.num_meta_tokens > 0

    @property
    def has_branch(self) -> bool:
        """Whether any layer has the meta branch."""
        return any(self.config.model.layer_has_meta(layer) for layer in range(self.config.model.num_layers))

    @property
    def num_held_out(self) -> int:
        """Windows of the held-out set."""
        return self.samples.samples_per_epoch

    def held_out(
        self, num_samples: int, *, meta_tokens: bool = True, batch_size: int | None = None, first: int = 0
    ) -> Iterator[Batch]:
        """Batches on the model's device, the same at every call: ``num_samples`` windows (all, where there are fewer)
        evenly spread over the set, with documents and restarting positions where the configuration masks documents.

        Args:
            meta_tokens: False: the same windows without meta-tokens, T = L. Targets are the same: the first text token
                of a window never counts (spec §4).
            batch_size: sequences of a batch, the last one may have fewer. Default: train.micro_batch_size.
            first: leave out so many of the ``num_samples`` windows at their beginning.
        """
        form = self.form if meta_tokens else replace(self.form, num_meta_tokens=0)
        dataset = Dataset(self.samples, form)
        chosen = evenly_spread(num_samples, len(dataset))[first:]
        size = batch_size or self.config.train.micro_batch_size
        for start in range(0, len(chosen), size):
            batch = collate([dataset[index] for index in chosen[start : start + size]], form.num_meta_tokens)
            yield batch.to(self.device)

    def context(self, batch: Batch) -> Context:
        """What the model's blocks get beside the hidden states of a batch."""
        return make_context(
            self.model.config,
            batch.token_BT,
            position_BT=batch.position_BT,
            document_BT=batch.document_BT,
            num_meta_columns=batch.num_meta_columns,
        )

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last block's output, (B, T, D)."""
        return self.model.hidden_states(batch.token_BT, self.context(batch))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of the last block's output, or of any residual (logit lens): (…, D) to (…, V)."""
        return self.model.head(x_BTD, self.model.embedding.tokens.weight)

    def text(self, token: int) -> str:
        """A token as a reader sees it, quoted; its number where there is no tokenizer."""
        if self.form.num_meta_tokens and token == self.form.meta_token_id:
            return "[meta]"
        if self.tokenizer is None:
            return str(token)
        spelling = self.tokenizer.spelling(token)
        try:
            return repr(spelling.decode("utf-8"))
        except UnicodeDecodeError:  # a part of a character
            return repr(spelling)
