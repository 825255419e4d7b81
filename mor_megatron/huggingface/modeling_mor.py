"""Mixture-of-Recursions models (arXiv 2507.10524) for transformers: the backbone and its heads.

A layer that runs at several recursions is one module, stored once; `config.plan` says when it runs. Tokens are packed
rows throughout (`rows_mor.py`, `columns_mor.py`). A routing method decides how deep each of them goes, with the code
of training (`routing.py`); keys and values between calls are kept in `cache_mor.py`. These files travel with an
exported model, which loads with `trust_remote_code=True`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.plan import STRATEGIES, VirtualLayer
from mor_megatron.recursion.relaxation import Adapters, RecursionEmbedding
from mor_megatron.recursion.routing import RoutingMethod, Stream, run_recursions

from .attention_mor import Pair, Visibility, rotation_of
from .cache_mor import MoRCache
from .code_mor import write_code
from .columns_mor import Columns, predictable
from .configuration_mor import MoRConfig
from .layers_mor import MoRDecoderLayer
from .options_mor import refuse_unknown, routing_options
from .outputs_mor import MoRHeadOutput, MoRModelOutput
from .relaxed_mor import MoRRMSNorm, Recursions
from .rows_mor import PackedRows, Rows
from .serving_mor import NotServed, refuse_graphs
from .versions_mor import CACHE

logger = logging.get_logger(__name__)

NEVER = -1e4
"""Logit of what cannot come: its exponential is 0 in every precision, and sums over the vocabulary stay finite."""


class MoRPreTrainedModel(NotServed, PreTrainedModel):
    """What all MoR models share: their configuration, initialization, and what transformers may do with them."""

    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # A pass prepares once, on one device, what its layers know of the rows; and a shared layer runs many times a token.
    _no_split_modules = ("MoRModel",)
    _supports_sdpa = True
    _supports_flash_attn = True
    # Few numbers decide how deep every token goes: routers are loaded in fp32 whatever the dtype is (the second name, a
    # part of theirs), and quantisers leave them alone by default (the first, a pattern of theirs).
    _keep_in_fp32_modules = (".*router",)
    _keep_in_fp32_modules_strict = ("router",)

    def save_pretrained(self, save_directory, *arguments, **options):
        """As in transformers, and the code beside the weights, where transformers does not write it."""
        super().save_pretrained(save_directory, *arguments, **options)
        if self._auto_class is None:
            write_code(save_directory, self.config.routing_method, STRATEGIES[self.config.sharing_strategy])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RoutingMethod):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        if isinstance(module, nn.Linear | nn.Embedding | MoRRMSNorm):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Adapters | RecursionEmbedding) and not name.endswith("_a"):
                init.zeros_(parameter)
            elif parameter.ndim > 1:  # of adapters, and of a routing method's own modules
                init.normal_(parameter, std=self.config.initializer_range)


class MoRModel(MoRPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.plan = config.plan
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        shared = {use.physical for use in self.plan.shared}
        self.layers = nn.ModuleList(MoRDecoderLayer(config, i in shared) for i in range(self.plan.num_physical_layers))
        self.norm = MoRRMSNorm(config)
        self.recursion_embedding: RecursionEmbedding | None = None
        if config.relaxation_settings.recursion_embedding:
            self.recursion_embedding = RecursionEmbedding(config.num_recursions, config.hidden_size)
        self.router: RoutingMethod = config.routing_method(config.routing_settings, self.plan, PackedRows())
        self.router.build(config.hidden_size, torch.get_default_dtype())
        self.gradient_checkpointing = False
        self.post_init()

    def opened(self, rows: Tensor, recursion: Recursions) -> Tensor:
        """Rows as the first layer of their recursions reads them, [T, H]."""
        return rows if self.recursion_embedding is None else self.recursion_embedding(rows, recursion)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        depth: int | None = None,
        router_threshold: float | None = None,
        selection: str = "threshold",
        router_losses: bool = False,
        past_key_values: MoRCache | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MoRModelOutput:
        """Hidden states of new tokens.

        Args:
            input_ids: [B, S]; or inputs_embeds [B, S, H].
            attention_mask: [B, earlier columns + S], 0 at padding, wherever it stands. A token's position is its index
                among the real tokens of its sequence.
            cache: of earlier tokens; `past_key_values` is its old name.
            use_cache: return one that knows the new tokens as well; default the configuration's, without gradients.
            depth: recursions of every token; default the configuration's; None lets the router decide.
            router_threshold: expert-choice: a token goes on if the sigmoid of its logit is at least this.
            selection: expert-choice: `threshold`, or `capacity` as in pretraining, which looks at later tokens.
            router_losses: compute them.
            position_ids: [B, S], not needed. They may count several sequences in a row, each from 0: these do not see
                each other.
            output_hidden_states: return what each position of the network reads; default the configuration's.
            return_dict: False: a tuple of what is not None; default the configuration's.
        Raises:
            ValueError: an argument is unknown, out of range, or means nothing to this model.
        """
        config = self.config
        if self.router.routes:
            refuse_graphs()
        refuse_unknown({"output_attentions": config.output_attentions, **kwargs})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        depth, router_threshold = routing_options(config, depth, router_threshold, selection)
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, MoRCache | None):
            raise ValueError(f"cache is a {type(cache).__name__}: give none, or a MoRCache(config)")
        columns = Columns.of(embedded.shape[:2], attention_mask, position_ids, cache, embedded.device)
        cache = self._cache(cache, use_cache, columns.is_packed, selection)

        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        read: dict[int, Tensor] | None = {} if output_hidden_states else None
        options = RoutingContext(
            selection=selection,
            threshold=router_threshold,
            fixed_depth=depth,
            tokens=None if input_ids is None else columns.pack(input_ids),
            losses="sum" if router_losses else "none",
            metrics=None,
        )
        stream, passed = self._run(columns.pack(embedded), columns.rows, options, cache, read)
        hidden = columns.spread(self.norm(stream))
        depths = columns.mark(passed, padding=-1)
        if cache is not None:
            cache.commit(depths, columns.rows.lengths)
        states = None
        if read is not None:
            for position in range(config.num_hidden_layers - 1, -1, -1):  # one that did not run had no active rows
                stream = read.get(position, stream)
                read[position] = stream
            states = (*(columns.spread(read[i]) for i in range(config.num_hidden_layers)), hidden)
        return MoRModelOutput(hidden, cache, states, depths, options.loss)

    def _cache(
        self, cache: MoRCache | None, use_cache: bool | None, is_packed: bool, selection: str
    ) -> MoRCache | None:
        """The one to fill in this call."""
        learning = self.training and torch.is_grad_enabled()
        if is_packed:
            if use_cache or cache is not None:
                raise ValueError("several sequences in a row of position_ids cannot be continued: use_cache=False")
            return None
        if cache is not None and not cache.is_empty:
            if selection == "capacity" and self.router.looks_ahead:
                raise ValueError("selection=capacity compares whole sequences: give it no cache of earlier tokens")
            if learning and self.is_gradient_checkpointing:
                raise ValueError("a cache of earlier tokens does not go with gradient checkpointing: leave it out")
            return cache
        wanted = use_cache if use_cache is not None else cache is not None or (self.config.use_cache and not learning)
        if wanted and learning and self.is_gradient_checkpointing:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: there will be no cache")
            return None
        return MoRCache(self.config) if wanted and cache is None else cache

    def _run(
        self,
        hidden: Tensor,
        rows: Rows,
        options: RoutingContext,
        cache: MoRCache | None,
        read: dict[int, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """All layers: [T, H] -> [T, H], and the recursions that each token passed, [T] int8.

        `read` is filled with the state of all rows, [T, H], that each position of the network finds.
        """
        config, shares = self.config, self.config.kv_mode != "caching"
        rotation = rotation_of(rows.position, config, hidden.dtype)
        stored: dict[int, Pair] = {}  # keys and values of recursion 0, which later recursions read
        views: dict[int | None, Visibility] = {}
        passed = torch.zeros(len(rows), dtype=torch.int8, device=hidden.device)

        def run(layers: tuple[VirtualLayer, ...], hidden: Tensor, active: Rows, residual: Tensor) -> Tensor:
            for layer in layers:
                if layer in self.plan.openings:
                    hidden = self.opened(hidden, layer.recursion)
                if read is not None:
                    read[layer.index] = active.put(residual, hidden)
                reads = layer.kv_source != layer.index
                if layer.recursion not in views:
                    own = rotation if active is rows else rotation_of(active.position, config, hidden.dtype)
                    views[layer.recursion] = Visibility(active, rows, layer.recursion, reads, config, cache, own)
                source = stored[layer.kv_source] if reads else None
                hidden, own = self.layers[layer.physical](hidden, views[layer.recursion], layer, source)
                if layer.recursion == 0 and shares:
                    stored[layer.index] = own
            return hidden

        def run_pass(layers: tuple[VirtualLayer, ...], stream: Stream) -> Tensor:
            nonlocal passed
            active, recursions = stream.active, len({layer.recursion for layer in layers})
            passed = active.put(passed, active.take(passed) + recursions)
            return run(layers, stream.rows, active, stream.rows if stream.hidden is None else stream.hidden)

        hidden = run(self.plan.first, hidden, rows, hidden)
        stream = run_recursions(self.router, Stream(rows, rows, hidden), run_pass, options)
        hidden = self.router.merged(stream).hidden
        return run(self.plan.last, hidden, rows, hidden), passed


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """The language model. In training mode with labels, expert-choice selects by capacity, as in pretraining."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers wants a dict)

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.model = MoRModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MoRCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        depth: int | None = None,
        router_threshold: float | None = None,
        selection: str | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: MoRCache | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MoRHeadOutput:
        """Logits [B, S, V], and with labels the loss of predicting each token from those before it.

        Args:
            labels: [B, S], -100 where nothing is to be predicted; padding, and the first token of a sequence, count as
                such.
            logits_to_keep: columns from the end whose logits are computed; 0: all.
            selection: default `capacity` in training mode with labels, else `threshold`.
            num_items_in_batch: predictions over which the loss is averaged, where gradients are accumulated.
            Others as in `MoRModel`.
        Raises:
            ValueError: as in `MoRModel`.
        """
        fits = self.training and labels is not None
        outputs = self.model(
            input_ids,
            attention_mask,
            cache,
            inputs_embeds,
            use_cache,
            depth,
            router_threshold,
            selection or ("capacity" if fits else "threshold"),
            fits and self.config.router_losses,
            past_key_values,
            position_ids,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep > 0:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        if self.config.padding_row is not None:
            logits[..., self.config.padding_row] = NEVER
        loss = None
        if labels is not None:
            labels = predictable(labels, outputs.depths >= 0, position_ids)
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            if outputs.router_loss is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                loss = loss + share * outputs.router_loss
        return MoRHeadOutput(loss, logits, outputs.cache, outputs.hidden_states, outputs.depths, outputs.router_loss)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *arguments, **kwargs) -> dict:
        """Called by `generate` before each step; it also holds what only its stopping criteria read."""
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        cache = inputs.get(CACHE)
        if isinstance(cache, MoRCache) and cache.new_are_real:
            inputs["attention_mask"] = None  # it says so, and the host would wait to read it
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "cache_position")}

    def _prepare_position_ids_for_generation(self, *arguments) -> None:
        """Called by `generate`, whose positions are not those of right-padded prompts; the model's own are."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *rest) -> None:
        """Called by `generate` for the cache that it begins with."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind} cannot hold ragged keys and values: leave it out")
        if (layers := generation_config.assistant_early_exit) is not None:
            raise ValueError(f"assistant_early_exit={layers} would draft with other recursions: use assistant_model")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = MoRCache(self.config)
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE].new_are_real = False  # there may be padding in the prompt

    def _update_model_kwargs_for_generation(self, outputs: MoRHeadOutput, model_kwargs: dict, *rest, **options) -> dict:
        """Called by `generate` after each step."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *rest, **options)
        if outputs.cache is not None:
            model_kwargs[CACHE] = outputs.cache
            outputs.cache.new_are_real = True
        return model_kwargs


class MoRForSequenceClassification(MoRPreTrainedModel):
    """A class or a number for each sequence, read at its last token."""

    accepts_loss_kwargs = False

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MoRModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        selection: str | None = None,
        **kwargs,
    ) -> MoRHeadOutput:
        """Logits [B, num_labels], and with labels the loss of `config.problem_type`.

        Args:
            attention_mask: without one, `config.pad_token_id` is padding.
            labels: [B], or [B, num_labels].
            selection: as in `MoRForCausalLM`.
            Others as in `MoRModel`.
        Raises:
            ValueError: as in `MoRModel`.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        fits = self.training and labels is not None
        kwargs.setdefault("use_cache", False)  # nothing continues here
        outputs = self.model(
            input_ids,
            attention_mask,
            selection=selection or ("capacity" if fits else "threshold"),
            router_losses=fits and self.config.router_losses,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            config = copy.copy(self.config)  # the loss writes the kind of problem that it finds into it
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config)
            if outputs.router_loss is not None:
                loss = loss + outputs.router_loss
        return MoRHeadOutput(loss, logits, outputs.cache, outputs.hidden_states, outputs.depths, outputs.router_loss)


__all__ = ["MoRForCausalLM", "MoRForSequenceClassification", "MoRModel", "MoRPreTrainedModel"]
