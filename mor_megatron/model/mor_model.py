"""The model: embedding, unique first layer, passes over the shared block, unique last layer, head.

Every physical layer is one module, however often the plan visits it. The three parts of forward (enter, shared, leave)
are what a pipeline of several stages divides among ranks; here one stage holds all of them.
"""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.model.attention import LayerCall, RotaryTable, Sequences
from mor_megatron.model.layer_spec import RMSNorm, layer_spec, transformer_config
from mor_megatron.parallel.cpu import device
from mor_megatron.recursion import context as names
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens
from mor_megatron.recursion.expert_choice import ExpertChoice
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer, plan_from_config
from mor_megatron.recursion.routers import Router
from mor_megatron.recursion.token_choice import TokenChoice


class MoRModel(MegatronModule):
    """Mixture-of-Recursions language model; vanilla is Nr=1, recursive is routing none.

    Args:
        config: a validated run configuration.
        vocab_size: vocabulary before padding.
    Raises:
        ValueError: depth, Nr and sharing do not fit (see `plan_from_config`).
    """

    def __init__(self, config: Config, vocab_size: int):
        layer_config = transformer_config(config)
        super().__init__(config=layer_config)
        self.run_config = config
        self.plan: RecursionPlan = plan_from_config(config)
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
        self.model_type = ModelType.encoder_or_decoder
        self.tied = not config.model.untie_embeddings_and_output_weights

        self.embedding = LanguageModelEmbedding(
            layer_config, self.padded_vocab_size, config.model.max_position_embeddings, position_embedding_type="rope"
        )
        spec = layer_spec()
        self.layers = nn.ModuleList(
            build_module(spec, config=layer_config, layer_number=1 + physical)
            for physical in range(self.plan.num_physical_layers)
        )
        self.router = self._build_router(config)
        self.final_layernorm = RMSNorm(layer_config, layer_config.hidden_size, layer_config.layernorm_epsilon)
        self.output_layer = ColumnParallelLinear(
            layer_config.hidden_size,
            self.padded_vocab_size,
            config=layer_config,
            init_method=layer_config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.tied,
        )
        self.rotary = RotaryTable(
            layer_config.kv_channels, config.model.max_position_embeddings, config.model.rotary_base
        )

    def forward(self, batch: Batch, context: RoutingContext | None = None) -> Tensor:
        """Per-token cross entropy [B, S] fp32, unmasked, or logits [B, S, V] when the batch has no labels.

        Router losses, scaled by their coefficients and `context.router_loss_scale`, are attached to the graph; router
        metrics are left in `context.metrics`.

        Raises:
            ValueError: the sequence is longer than max-position-embeddings.
        """
        context = context or RoutingContext()
        batch_size, seq_length = batch.tokens.shape
        longest = self.run_config.model.max_position_embeddings
        if seq_length > longest:
            raise ValueError(f"a sequence of {seq_length} tokens exceeds max-position-embeddings={longest}")
        sequences = Sequences(
            self.rotary, seq_length, batch_size, self.config.params_dtype, batch.position_ids, batch.document_ids
        )
        hidden = self._enter(batch.tokens, sequences)
        hidden = self._shared(hidden, sequences, context)
        return self._leave(hidden, sequences, batch.labels)

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron-core's schedules hand over what the previous stage sent; a single stage receives nothing."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        assert all(tensor is None for tensor in tensors)

    def finish_iteration(self, metrics: dict[str, Tensor | float], iteration: int) -> None:
        """After an applied optimizer step: loss-free balancing from the global means of `context.metrics`."""
        recursion = self.run_config.recursion
        if recursion.routing != "token_choice" or recursion.router_balance != "loss_free":
            return
        if iteration <= recursion.router_balance_warmup_iters:
            return  # every token was sent to full depth: the fractions say nothing about the router
        fractions = [float(metrics[names.DEPTH_FRACTION.format(r)]) for r in range(self.plan.num_recursions)]
        self.router.update_bias(torch.tensor(fractions))

    def _build_router(self, config: Config) -> nn.Module | None:
        recursion, model = config.recursion, config.model

        def make_router(num_outputs: int) -> Router:
            return Router(
                recursion.router_type,
                model.hidden_size,
                num_outputs,
                recursion.router_temperature,
                model.init_method_std,
                self.config.params_dtype,
            )

        if recursion.routing == "expert_choice":
            return ExpertChoice(recursion, self.plan, make_router)
        if recursion.routing == "token_choice":
            return TokenChoice(recursion, self.plan, make_router)
        return None

    def _enter(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Embedding and first unique layer: [B, S] -> [S, B, H]."""
        hidden = self.embedding(tokens, position_ids=None)
        return self._run(self.plan.first, hidden, sequences, ActiveTokens(*hidden.shape[:2]))

    def _shared(self, hidden: Tensor, sequences: Sequences, context: RoutingContext) -> Tensor:
        """All recursions: [S, B, H] -> [S, B, H]."""

        def block(recursion: int, rows: Tensor, active: ActiveTokens) -> Tensor:
            return self._run(self.plan.pass_layers(recursion), rows, sequences, active)

        if self.router is not None:
            return self.router(hidden, block, context)
        depth = context.depth(self.plan.num_recursions)
        layers = tuple(layer for layer in self.plan.shared if layer.recursion < depth)
        return self._run(layers, hidden, sequences, ActiveTokens(*hidden.shape[:2]))

    def _leave(self, hidden: Tensor, sequences: Sequences, labels: Tensor | None) -> Tensor:
        """Last unique layer, final norm, head and loss: [S, B, H] -> [B, S] or logits [B, S, V]."""
        hidden = self._run(self.plan.last, hidden, sequences, ActiveTokens(*hidden.shape[:2]))
        hidden = self.final_layernorm(hidden)
        weight = self.embedding.word_embeddings.weight if self.tied else None
        logits, _ = self.output_layer(hidden, weight=weight)  # [S, B, V/tp]
        if labels is None:
            return logits[..., : self.vocab_size].transpose(0, 1)
        if self.padded_vocab_size != self.vocab_size:
            # A padding id is no prediction: without this, the loss would depend on how much padding there is.
            logits = logits.clone()
            logits[..., self.vocab_size :] = float("-inf")
        losses = vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous())
        return losses.transpose(0, 1)

    def _run(
        self, layers: tuple[VirtualLayer, ...], hidden: Tensor, sequences: Sequences, active: ActiveTokens
    ) -> Tensor:
        own_keys = sequences.pattern(active, keys_of_all=False)
        all_keys = sequences.pattern(active, keys_of_all=True)
        for layer in layers:
            pattern = own_keys if layer.kv_source == layer.index else all_keys
            call = LayerCall(pattern, layer, self.plan.kv_mode)
            hidden, _ = self.layers[layer.physical](hidden, attention_mask=call)
        return hidden


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """The vocabulary rounded up to a multiple of `divisor`."""
    return -(-vocab_size // divisor) * divisor


def build_model(config: Config, vocab_size: int) -> MoRModel:
    """The model on this process's device, in the run's parameter type, with weights drawn from the run's seed.

    Needs `initialize_distributed` first.

    Raises:
        ValueError: the configuration does not describe a model.
    """
    torch.manual_seed(config.training.seed)
    return MoRModel(config, vocab_size).to(device())
