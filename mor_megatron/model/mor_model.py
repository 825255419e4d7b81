"""The model: embedding, unique first layer, passes over the shared block, unique last layer, head.

Every physical layer is one module, however often the plan visits it. A pipeline rank holds the parts of its stage
(`planning.stages`), under the same names; `pipeline.ring` runs them in turn. Without a pipeline, `forward` does.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.distributed.cpu import device
from mor_megatron.distributed.row_exchange import ShardedRows
from mor_megatron.model.attention import AttentionMetadata, KeyValue, LayerCall, PartialProduct, RotaryTable
from mor_megatron.model.distillation import Distillation
from mor_megatron.model.elementwise import implementation
from mor_megatron.model.initialization import initialize_weights
from mor_megatron.model.layer_spec import MoRTransformerLayer, RMSNorm, layer_spec, transformer_config
from mor_megatron.model.loss import chunked_losses, whole_losses
from mor_megatron.model.recompute import recompute
from mor_megatron.model.stored_names import EMBEDDING, HEAD
from mor_megatron.planning.accounting import padded_vocab_size
from mor_megatron.planning.activations import loss_chunk_rows
from mor_megatron.planning.stages import PipelinePlan, pipeline_plan
from mor_megatron.recursion.context import RoutingContext
from mor_megatron.recursion.dispatch import ActiveTokens, LocalRows
from mor_megatron.recursion.methods import method_of
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer
from mor_megatron.recursion.relaxation import RecursionEmbedding
from mor_megatron.recursion.routing import RoutingMethod, Stream, run_recursions


class PhysicalLayers(nn.ModuleDict):
    """The unique layers that this rank holds, by their number in the whole model."""

    def __getitem__(self, physical: int) -> nn.Module:
        return super().__getitem__(str(physical))


class OutputLayer(PartialProduct, ColumnParallelLinear):
    """The head; or head and loss in one, without logits between them."""


class MoRModel(MegatronModule):
    """Mixture-of-Recursions language model; vanilla is Nr=1, recursive is routing none.

    Args:
        config: a validated run configuration, its vocabulary resolved.
    Raises:
        ValueError: depth, Nr and sharing do not fit (see `Config.plan`), or the routing method has a parameter outside
            its submodules.
    """

    def __init__(self, config: Config):
        layer_config = transformer_config(config)
        super().__init__(config=layer_config)
        self.run_config = config
        self.pipeline: PipelinePlan = pipeline_plan(config)
        self.plan: RecursionPlan = self.pipeline.plan
        # A model of one stage may stand beside a pipeline: a teacher.
        self.stage = parallel_state.get_pipeline_model_parallel_rank() if self.pipeline.num_stages > 1 else 0
        self.distillation: Distillation | None = None
        self.vocab_size = config.model.vocab_size
        self.padded_vocab_size = padded_vocab_size(
            self.vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
        )
        self.model_type = ModelType.encoder_or_decoder
        self.tied = not config.model.untie_embeddings_and_output_weights
        self.loss_chunk_rows = loss_chunk_rows(config, device().type == "cuda")
        add_rows = implementation(device().type).add_rows
        self.rows = LocalRows(device(), add_rows)
        if layer_config.sequence_parallel:
            self.rows = ShardedRows(parallel_state.get_tensor_model_parallel_group(), device(), add_rows)

        shared = {layer.physical for layer in self.plan.shared}
        specs = {is_shared: layer_spec(config, is_shared) for is_shared in (False, True)}
        self.layers = PhysicalLayers(
            {
                str(physical): build_module(specs[physical in shared], config=layer_config, layer_number=1 + physical)
                for physical in self.pipeline.physical_layers(self.stage)
            }
        )
        for layer in self.layers.values():
            layer.self_attention.recompute_core_attention = config.training.recompute_granularity == "selective"
        if self.is_first_stage:
            self.embedding = LanguageModelEmbedding(
                layer_config,
                self.padded_vocab_size,
                config.model.max_position_embeddings,
                position_embedding_type="rope",
            )
        # After the embedding: the order of the modules is that of the optimizer's state.
        self.router: RoutingMethod = method_of(config.recursion.routing)(config.recursion, self.plan, self.rows)
        if self.is_first_stage:
            self.router.build(layer_config.hidden_size, layer_config.params_dtype)
            bare = [name for name, _ in self.router.named_parameters(recurse=False)]
            if bare:  # ZeRO-3 gathers weights for the backward pass of modules that return tensors
                raise ValueError(
                    f"routing={config.recursion.routing} has the parameters {', '.join(bare)} outside a submodule: put "
                    "them into one that maps rows to values, as Router does"
                )
            for weight in self.router.parameters():
                weight.sequence_parallel = layer_config.sequence_parallel
        self.recursion_embedding = None
        if self.is_first_stage and config.recursion.recursion_embedding:
            width, dtype = layer_config.hidden_size, layer_config.params_dtype
            self.recursion_embedding = RecursionEmbedding(self.plan.num_recursions, width, dtype)
            self.recursion_embedding.weight.sequence_parallel = layer_config.sequence_parallel
        if self.is_last_stage:
            self.final_layernorm = RMSNorm(layer_config, layer_config.hidden_size, layer_config.layernorm_epsilon)
            self.output_layer = OutputLayer(
                layer_config.hidden_size,
                self.padded_vocab_size,
                config=layer_config,
                init_method=layer_config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.tied and self.is_first_stage,
            )
            if self.tied and not self.is_first_stage:
                self.output_layer.weight.is_tied_copy = True
        shape = config.model
        scaling = shape.rope_scaling_factor if shape.use_rope_scaling else None
        self.rotary = RotaryTable(layer_config.kv_channels, shape.max_position_embeddings, shape.rotary_base, scaling)

    @property
    def is_first_stage(self) -> bool:
        """This rank has the embedding and the routers."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank has the head."""
        return self.stage == self.pipeline.num_stages - 1

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This rank's copy of a weight that embedding and head share over two ranks."""
        if not self.tied or self.pipeline.num_stages == 1:
            return None
        if self.is_first_stage:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.is_last_stage else None

    def forward(self, batch: Batch, context: RoutingContext | None = None) -> Tensor:
        """Per-token cross entropy [B, S] fp32, unmasked, or logits [B, S, V] when the batch has no labels.

        In training with a teacher, [3, B, S]: what is minimized, and its parts (`distillation.py`).
        The gradient of the losses must be a multiple of the batch's loss mask (`loss.chunked_losses`).
        Router losses, scaled by their coefficients and `context.router_loss_scale`, are attached to the graph; router
        metrics are left in `context.metrics`.

        Raises:
            ValueError: the sequence is longer than max-position-embeddings.
        """
        return self.predict(self.final_states(batch, context), batch)

    def final_states(self, batch: Batch, context: RoutingContext | None = None) -> Tensor:
        """What the head reads of every token, [S, B, H], or this rank's share of the sequence."""
        assert self.pipeline.num_stages == 1, "a pipeline runs through pipeline.ring"
        context = context or RoutingContext()
        metadata = self.attention_metadata(batch)
        stream = self.embed(batch, metadata, context)

        def run(layers: tuple[VirtualLayer, ...], stream: Stream) -> Tensor:
            return self.run_layers(layers, stream.rows, metadata, stream.active)

        def walk_along(layers: tuple[VirtualLayer, ...], stream: Stream) -> Stream:
            """One row through the layers, forward and backward, without effect.

            Under ZeRO-3, weights are gathered where a layer is entered, by all data-parallel ranks together."""
            row = torch.zeros(1, 1, dtype=torch.int64, device=stream.hidden.device)
            one = stream.tokens.take(row, (1,) + (0,) * (stream.tokens.batch_size - 1))
            update = self.run_layers(layers, stream.hidden[:1, :1], metadata, one)
            return replace(stream, hidden=stream.hidden + 0.0 * update.sum())

        idle = walk_along if self.run_config.training.zero_stage == 3 else None
        stream = run_recursions(self.router, stream, run, context, idle)
        return self.finish(self.router.merged(stream).hidden, metadata)

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron-core's schedules hand over what the previous stage sent; a single stage receives nothing."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        assert all(tensor is None for tensor in tensors)

    def after_step(self, metrics: dict[str, Tensor | float], iteration: int) -> None:
        """After an applied optimizer step, with the global means of `context.metrics`."""
        if self.is_first_stage:
            self.router.after_step(metrics, iteration)

    def attention_metadata(self, batch: Batch) -> AttentionMetadata:
        """What attention has to know about a micro-batch.

        Raises:
            ValueError: the sequence is longer than max-position-embeddings.
        """
        batch_size, seq_length = batch.tokens.shape
        longest = self.run_config.model.max_position_embeddings
        if seq_length > longest:
            raise ValueError(f"a sequence of {seq_length} tokens exceeds max-position-embeddings={longest}")
        return AttentionMetadata(
            self.rotary, seq_length, batch_size, self.config.params_dtype, batch.position_ids, batch.document_ids
        )

    def embed(self, batch: Batch, metadata: AttentionMetadata, context: RoutingContext) -> Stream:
        """Embedding and unique first layers: tokens [B, S] -> the residual stream [S, B, H]."""
        context.tokens = batch.tokens.transpose(0, 1)
        if context.metrics is not None:
            context.metrics.clear()
        tokens = metadata.all_tokens
        hidden = self.run_layers(self.plan.first, self.embedding(batch.tokens, position_ids=None), metadata, tokens)
        return Stream(tokens, tokens, hidden)

    def run_layers(
        self, layers: tuple[VirtualLayer, ...], rows: Tensor, metadata: AttentionMetadata, active: ActiveTokens
    ) -> Tensor:
        """Consecutive layers on the rows of the active tokens, [k, B, H] -> [k, B, H]."""
        kv_mode, training = self.plan.kv_mode, self.run_config.training
        own_keys = metadata.pattern(active, keys_of_all=False)
        all_keys = metadata.pattern(active, keys_of_all=True)
        shared = dict(metadata.store)  # as it is now: a region may be computed again after the store was cleared

        def call_of(layer: VirtualLayer, store: Mapping[int, KeyValue]) -> LayerCall:
            if layer.kv_source != layer.index:
                shared_kv, updates = store[layer.kv_source], kv_mode == "sharing_update"
                return LayerCall(all_keys, layer.recursion, shared_kv, updates)
            stores = kv_mode != "caching" and layer.recursion is not None
            return LayerCall(own_keys, layer.recursion, stores_kv=stores)

        def run_all(rows: Tensor, each: Callable | None = None) -> tuple[Tensor, dict[int, KeyValue]]:
            """The rows, and the keys and values that these layers store: a region changes nothing outside itself."""
            stored: dict[int, KeyValue] = {}
            for layer in layers:
                if self.recursion_embedding is not None and layer in self.plan.openings:
                    rows = self.recursion_embedding(rows, layer.recursion)
                arguments = self.layers[layer.physical], rows, call_of(layer, ChainMap(stored, shared))
                rows, own = _run_layer(*arguments) if each is None else each(_run_layer, *arguments)
                if own is not None:
                    stored[layer.index] = own
            return rows, stored

        if training.recompute_granularity != "full":
            rows, stored = run_all(rows)
        elif training.recompute_unit == "layer":
            rows, stored = run_all(rows, recompute)
        else:
            rows, stored = recompute(run_all, rows)
        metadata.store.update(stored)
        return rows

    def head(self, hidden: Tensor, metadata: AttentionMetadata, batch: Batch) -> Tensor:
        """Unique last layers, final norm, head and loss: [S, B, H] -> as `forward`."""
        return self.predict(self.finish(hidden, metadata), batch)

    def finish(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Unique last layers and final norm, [S, B, H] -> the same shape."""
        hidden = self.run_layers(self.plan.last, hidden, metadata, metadata.all_tokens)
        return self.final_layernorm(hidden)

    @property
    def tied_head(self) -> nn.Parameter | None:
        """The embedding, where it is the head's weight as well."""
        return self.embedding.word_embeddings.weight if self.output_layer.weight is None else None

    def predict(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Head and loss: [S, B, H] -> as `forward`."""
        tied = self.tied_head
        if batch.labels is None:
            logits, _ = self.output_layer(hidden, weight=tied)  # [S, B, V/TP]
            return gather_from_tensor_model_parallel_region(logits)[..., : self.vocab_size].transpose(0, 1)
        labels = batch.labels.transpose(0, 1).contiguous()
        chunk = self.loss_chunk_rows
        teacher = None if self.distillation is None or not self.training else self.distillation.predictions(batch)
        if teacher is None and (chunk == 0 or (labels.numel() <= chunk and not hidden.is_cuda)):
            logits, _ = self.output_layer(hidden, weight=tied)
            return whole_losses(logits, labels, self.vocab_size).transpose(0, 1)
        counted = None if batch.loss_mask is None else batch.loss_mask.transpose(0, 1)
        sequence_parallel = self.config.sequence_parallel

        def losses(hidden: Tensor, weight: Tensor | None, bias: None) -> Tensor:
            weight = weight if tied is None else tied
            arguments = hidden, weight, labels, counted, chunk or labels.numel(), self.vocab_size, sequence_parallel
            return chunked_losses(*arguments) if teacher is None else chunked_losses(*arguments, teacher)

        return self.output_layer(hidden, product=losses).transpose(-2, -1)


def _run_layer(layer: MoRTransformerLayer, rows: Tensor, call: LayerCall) -> tuple[Tensor, KeyValue | None]:
    return layer(rows, call)


def build_model(config: Config) -> MoRModel:
    """This rank's part of the model on its device, in the run's parameter type, with weights drawn from the run's seed.

    Needs `initialize_distributed` first.

    Raises:
        ValueError: the configuration does not describe a model.
    """
    model = MoRModel(config)
    aliases = {HEAD: EMBEDDING} if model.tied else {}
    initialize_weights(model, config.training.seed, config.model.init_method_std, model.vocab_size, aliases)
    return model.to(device())
