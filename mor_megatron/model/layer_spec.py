"""The Transformer layer: Megatron-core's, with our norm, activation and attention in its slots.

With Transformer Engine, its linears and norms instead."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.model.attention import CoreAttention, KeyValue, LayerCall, MoRSelfAttention
from mor_megatron.model.attention_by_shape import AttentionByShape
from mor_megatron.model.elementwise import implementation
from mor_megatron.model.kernels import attention_kernels, uses_transformer_engine
from mor_megatron.model.relaxed_linear import Parts, relaxed
from mor_megatron.planning.accounting import Widths
from mor_megatron.recursion.relaxation import keep_initial


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, statistics in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]"""
        return implementation(x.device.type).rms_norm(x, self.weight, self.eps)


class AddedRMSNorm(RMSNorm):
    """The norm of a residual stream that an update is added to, in one."""

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[.., H] -> x + update, or x, and its norm, both [.., H]."""
        return implementation(x.device.type).add_norm(x, update, self.weight, self.eps)


class RecursionRMSNorm(AddedRMSNorm):
    """A norm that has a weight of its own at each recursion, [Nr, H]."""

    num_recursions: ClassVar[int]

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        weight = keep_initial(nn.Parameter(self.weight.detach().repeat(self.num_recursions, 1)))
        weight.sequence_parallel, weight.is_norm = config.sequence_parallel, True
        self.weight = weight

    def forward(self, x: Tensor, update: Tensor | None, recursion: int) -> tuple[Tensor, Tensor]:
        """As `AddedRMSNorm`, at a recursion."""
        return implementation(x.device.type).add_norm(x, update, self.weight[recursion], self.eps)


class SwiGLU(nn.Module):
    """silu(gate) * up of [.., 2F] = (gate, up)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[.., 2F] -> [.., F]"""
        return implementation(x.device.type).swiglu(x)


class MoRTransformerLayer(TransformerLayer):
    """Megatron-core's pre-norm layer, told at each use what differs from use to use."""

    def forward(self, rows: Tensor, call: LayerCall) -> tuple[Tensor, KeyValue | None]:
        """[k, B, H] or [T, 1, H] -> the same shape, and the keys and values that `call` stores."""
        rows, normal = _add_norm(self.input_layernorm, rows, None, call.recursion)
        update, stored = self.self_attention(normal, call)
        rows, normal = _add_norm(self.pre_mlp_layernorm, rows, update, call.recursion)
        inner, _ = self.mlp.linear_fc1(normal, call.recursion)
        update, _ = self.mlp.linear_fc2(self.mlp.activation_func(inner), call.recursion)
        return rows + update, stored


def _add_norm(norm: nn.Module, rows: Tensor, update: Tensor | None, recursion: int | None) -> tuple[Tensor, Tensor]:
    """rows + update, or rows, and the norm of that, by a norm of ours or of a library."""
    if isinstance(norm, RecursionRMSNorm):
        return norm(rows, update, recursion)
    if isinstance(norm, AddedRMSNorm):
        return norm(rows, update)
    rows = rows if update is None else rows + update
    return rows, norm(rows)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's configuration of one layer.

    Layers are told that the pipeline has one stage: which of them run where is the recursion plan's business.
    """
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        # The slot of this name takes any activation module, here ours.
        use_te_activation_func=True,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are drawn by `initialization.py`, independent of the layout.
        init_method=_leave_alone,
        output_layer_init_method=_leave_alone,
        embedding_init_method=_leave_alone,
        params_dtype=config.training.dtype,
        bf16=config.training.bf16,
        fp16=config.training.fp16,
        deterministic_mode=config.training.deterministic_mode,  # of the embedding's backward pass
        # The schedule must not divide by micro-batches: the loss comes divided by the global number of tokens.
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _leave_alone(weight: Tensor) -> None:
    pass


def layer_spec(config: Config, is_shared: bool = False) -> ModuleSpec:
    """Our layer with parallel linears and norms from Megatron-core's backend and our parts between them.

    Transformer Engine's module of a norm and a linear in one is not used: queries alone are projected from the
    normalised rows where recursions share keys, it names the norm's weight in another way, and it saves time only in
    fp8. So parameter names are the same for every backend. (Transformer Engine: reasoned, not run.)

    Args:
        config: of the run.
        is_shared: the layer belongs to the shared block, where recursions may differ.
    Raises:
        ValueError: a flag asks for a library that cannot be used here.
    """
    column, row, norm = ColumnParallelLinear, RowParallelLinear, AddedRMSNorm
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
        column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
        norm = backend.layer_norm(rms_norm=True)
    core_attention = CoreAttention
    kernels = attention_kernels(config)
    if kernels is not None:
        core_attention = ModuleSpec(AttentionByShape, params={"kernels": kernels})
    if is_shared and config.recursion.recursion_norms:
        norm = type("SharedNorm", (RecursionRMSNorm,), {"num_recursions": config.plan.num_recursions})
    qkv, out, gate_up, down = _parts(config) if is_shared else (None,) * 4
    return ModuleSpec(
        module=MoRTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=MoRSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=relaxed(column, config, qkv),
                    core_attention=core_attention,
                    linear_proj=relaxed(row, config, out),
                ),
            ),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=relaxed(column, config, gate_up),
                    linear_fc2=relaxed(row, config, down),
                    activation_func=SwiGLU,
                ),
            ),
        ),
    )


def _parts(config: Config) -> tuple[Parts, Parts, Parts, Parts]:
    """Of the four linear layers."""
    widths, groups = Widths.of(config), config.model.key_value_heads // config.parallel.tensor_model_parallel_size
    return (
        Parts({"q": widths.query, "k": widths.key_value, "v": widths.key_value}, groups=groups),
        Parts({"o": widths.hidden}, is_row=True),
        Parts({"gate": widths.ffn, "up": widths.ffn}),
        Parts({"down": widths.hidden}, is_row=True),
    )
