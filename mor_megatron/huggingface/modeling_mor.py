"""Mixture-of-Recursions language models (arXiv 2507.10524) for transformers.

A layer that runs at several recursions is one module, stored once; `config.plan` says when it runs. Tokens are packed
rows throughout (`rows_mor.py`); who goes how deep is decided in `routing_mor.py`; keys and values between calls are
kept in `cache_mor.py`. These files travel with an exported model, which loads with `trust_remote_code=True`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention_mor import MoRAttention, Pair, Visibility, rotation_of
from .cache_mor import MoRCache
from .configuration_mor import LayerUse, MoRConfig
from .routing_mor import ROUTING, Orders
from .rows_mor import Rows

NEVER = -1e4
"""Logit of what cannot come: its exponential is 0 in every precision, and sums over the vocabulary stay finite."""


class MoRRMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded before the weight, as LLaMA does."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        if x.dtype == self.weight.dtype == torch.float32:  # one pass; nothing is rounded in between
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class MoRMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoRDecoderLayer(GradientCheckpointingLayer):
    """One stored layer."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.self_attn = MoRAttention(config)
        self.mlp = MoRMLP(config)
        self.input_layernorm = MoRRMSNorm(config)
        self.post_attention_layernorm = MoRRMSNorm(config)

    def forward(
        self, hidden: Tensor, visibility: Visibility, use: LayerUse, source: Pair | None
    ) -> tuple[Tensor, Pair | None]:
        """[T, H] -> [T, H], and the rows' own keys and values if later recursions read them."""
        update, own = self.self_attn(self.input_layernorm(hidden), visibility, use, source)
        hidden = hidden + update
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own


class MoRPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the family."""

    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # A pass prepares once, on one device, what its layers know of the rows; and a shared layer runs many times a token.
    _no_split_modules = ("MoRModel",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ("balance_bias",)


@dataclass
class MoRModelOutput(ModelOutput):
    """Of `MoRModel`."""

    last_hidden_state: Tensor | None = None
    """[B, S, H] after the final norm. At padding: that of the last real token before it, 0 if there is none."""
    cache: MoRCache | None = None
    depths: Tensor | None = None
    """[B, S] int8: recursions that each token passed; -1 at padding."""
    router_loss: Tensor | None = None
    """Router losses times their coefficients, where they were asked for."""


@dataclass
class MoRCausalLMOutput(ModelOutput):
    """Of `MoRForCausalLM`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MoRCache | None = None
    depths: Tensor | None = None
    """As in `MoRModelOutput`."""
    router_loss: Tensor | None = None
    """Part of `loss`."""


class MoRModel(MoRPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.plan = config.plan
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoRDecoderLayer(config) for _ in range(self.plan.num_physical_layers))
        self.norm = MoRRMSNorm(config)
        self.router = ROUTING[config.routing](config) if config.routing in ROUTING else None
        self.gradient_checkpointing = False
        self.post_init()

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
        return_dict: bool | None = None,
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
        Raises:
            ValueError: an argument is unknown, out of range, or means nothing to this model.
        """
        refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        depth = config.depth if depth is None else depth
        router_threshold = config.router_threshold if router_threshold is None else router_threshold
        orders = Orders(config, depth, router_threshold, selection, router_losses)
        cache = past_key_values if cache is None else cache
        learning = self.training and torch.is_grad_enabled()
        if cache is None and (config.use_cache and not learning if use_cache is None else use_cache):
            cache = MoRCache(config)
        if cache is not None and learning and self.is_gradient_checkpointing:
            raise ValueError("use_cache=True does not go with gradient checkpointing: leave it out")
        if not isinstance(cache, MoRCache | None):
            raise ValueError(f"cache is a {type(cache).__name__}: give none, or a MoRCache(config)")

        if (
            selection == "capacity"
            and cache is not None
            and not cache.is_empty
            and self.config.routing == "expert_choice"
        ):
            raise ValueError("selection=capacity compares whole sequences: give it no cache of earlier tokens")

        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, columns = embedded.shape[:2]
        real = real_columns(attention_mask, batch, columns)
        rows, index = pack(real, batch, columns, cache, embedded.device)
        hidden = embedded.flatten(0, 1)
        if index is not None:
            hidden = hidden[index]
        hidden, passed = self._run(hidden, rows, orders, cache)
        hidden = self.norm(hidden)
        if index is not None:
            passed = passed.new_full((batch * columns,), -1).index_copy(0, index, passed)
            hidden = spread(hidden, real)
        depths = passed.view(batch, columns)
        if cache is not None:
            cache.commit(depths, rows.lengths)
        return MoRModelOutput(hidden.view(batch, columns, -1), cache, depths, orders.loss)

    def _run(self, hidden: Tensor, rows: Rows, orders: Orders, cache: MoRCache | None) -> tuple[Tensor, Tensor]:
        """All layers: [T, H] -> [T, H], and the recursions that each token passed, [T] int8."""
        config, shares = self.config, self.config.kv_mode != "caching"
        rotation = rotation_of(rows.position, config, hidden.dtype)
        left: dict[int, Pair] = {}  # keys and values of recursion 0, which later recursions read
        views: dict[int | None, Visibility] = {}

        def layers(uses: tuple[LayerUse, ...], hidden: Tensor, active: Rows) -> Tensor:
            for use in uses:
                reads = use.kv_source != use.index
                if use.recursion not in views:
                    own = rotation if active is rows else rotation_of(active.position, config, hidden.dtype)
                    views[use.recursion] = Visibility(active, rows, use.recursion, reads, config, cache, own)
                source = left[use.kv_source] if reads else None
                hidden, own = self.layers[use.physical](hidden, views[use.recursion], use, source)
                if use.recursion == 0 and shares:
                    left[use.index] = own
            return hidden

        hidden = layers(self.plan.first, hidden, rows)
        if self.router is None:
            hidden = layers(self.plan.shared(orders.num_recursions), hidden, rows)
            passed = torch.full((len(rows),), orders.num_recursions, dtype=torch.int8, device=hidden.device)
        else:

            def block(recursion: int, x: Tensor, active: Rows) -> Tensor:
                return layers(self.plan.pass_layers(recursion), x, active)

            hidden, passed = self.router(hidden, rows, block, orders)
        return layers(self.plan.last, hidden, rows), passed


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """The language model. In training mode with labels, expert-choice selects by capacity, as in pretraining."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers wants a dict)

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.model = MoRModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        return_dict: bool | None = None,
        **kwargs,
    ) -> MoRCausalLMOutput:
        """Logits [B, S, V], and with labels the loss of predicting each token from those before it.

        Args:
            labels: [B, S], -100 where nothing is to be predicted; padding counts as such.
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
            labels = labels.masked_fill(outputs.depths < 0, -100)
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
            if outputs.router_loss is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                loss = loss + share * outputs.router_loss
        result = MoRCausalLMOutput(loss, logits, outputs.cache, outputs.depths, outputs.router_loss)
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *rest) -> None:
        """Called by `generate` for the cache that it begins with."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind} cannot hold ragged keys and values: leave it out")
        if generation_config.use_cache and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = MoRCache(self.config)


def refuse_unknown(kwargs: dict) -> None:
    """Nothing that is asked for is ignored.

    Raises:
        ValueError: an argument that is not known has a value.
    """
    for name, value in kwargs.items():
        if name == "position_ids" and value is not None:
            raise ValueError("position_ids follow from attention_mask: leave them out")
        if value is not None and value is not False:
            raise ValueError(f"{name} is not known to MoR models: leave it out")


def real_columns(attention_mask: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """[B, S] bool, true at real tokens; None: all of them.

    Raises:
        ValueError: the mask is not [B, at least S], or there is nothing but padding.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}: give [{batch}, {columns} or more], 0 at padding"
        )
    real = attention_mask[:, -columns:].bool()
    if bool(real.all()):
        return None
    if not bool(real.any()):
        raise ValueError("attention_mask has no real token among the new columns: give at least one")
    return real


def pack(
    real: Tensor | None, batch: int, columns: int, cache: MoRCache | None, device: torch.device
) -> tuple[Rows, Tensor | None]:
    """The real tokens as rows, and their places [T] among the batch's columns (None: all)."""
    past = cache.lengths if cache is not None and not cache.is_empty else (0,) * batch
    if len(past) != batch:
        raise ValueError(f"cache holds {len(past)} sequences and input_ids {batch}: give both the same")
    if real is None:
        sequence = torch.arange(batch, device=device).repeat_interleave(columns)
        return Rows.of(sequence, past, (columns,) * batch), None
    index = real.flatten().nonzero().squeeze(1)
    lengths = tuple(real.sum(1).tolist())
    return Rows.of(index // columns, past, lengths), index


def spread(hidden: Tensor, real: Tensor) -> Tensor:
    """[T, H] -> [B*S, H]: a padding column shows the last real token before it, so that the last column of a
    right-padded sequence is where its continuation is read; 0 where there is none."""
    within = real.cumsum(1)
    counts = within[:, -1]
    index = within - 1 + (counts.cumsum(0) - counts).unsqueeze(1)
    shown = hidden[index.clamp(min=0, max=len(hidden) - 1)]
    return shown.masked_fill((within == 0).unsqueeze(2), 0.0).flatten(0, 1)


MoRModel.register_for_auto_class("AutoModel")
MoRForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoRForCausalLM", "MoRModel", "MoRPreTrainedModel"]
