"""The alternative to the ring: the recursive model as DeepSpeed's PipelineModule with TiedLayerSpec.

The unrolled layers are divided evenly among the stages. A layer that occurs on several stages has a copy on each, and
the gradients of the copies are summed at the end of an iteration. There is no routing. For benchmarks only: the layers
are ours and the initial weights are those of `MoRModel`, so both must give the same loss.
"""

from __future__ import annotations

import mor_megatron  # noqa: F401  # isort: skip  # before Megatron-core: quiets what it announces

import contextlib
import os
from collections.abc import Callable, Iterator

import deepspeed
import deepspeed.comm
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mor_megatron.config.schema import Config
from mor_megatron.data.batch import Batch
from mor_megatron.model.attention import AttentionMetadata, LayerCall, RotaryTable
from mor_megatron.model.initialization import initialize_weights
from mor_megatron.model.layer_spec import RMSNorm, layer_spec, transformer_config
from mor_megatron.recursion.dispatch import ActiveTokens
from mor_megatron.training.modes.wrapping import quiet
from mor_megatron.training.optimizer import build_optimizer, set_learning_rate


class Embedding(nn.Embedding):
    """Token embedding, [B, S] -> [S, B, H]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.transpose(0, 1))


def head(embedding: Embedding, hidden: Tensor) -> Tensor:
    """Logits from the embedding's weight."""
    return F.linear(hidden, embedding.weight)


class Block(nn.Module):
    """One of our layers with plain causal attention, [S, B, H] -> [S, B, H]."""

    def __init__(self, config: Config):
        super().__init__()
        layer_config = transformer_config(config)
        self.layer = build_module(layer_spec(config), config=layer_config, layer_number=1)
        model = config.model
        self.rotary = RotaryTable(layer_config.kv_channels, model.max_position_embeddings, model.rotary_base)

    def forward(self, hidden: Tensor) -> Tensor:
        active = ActiveTokens(*hidden.shape[:2])
        pattern = AttentionMetadata(self.rotary, *hidden.shape[:2], hidden.dtype).pattern(active, keys_of_all=False)
        return self.layer(hidden, LayerCall(pattern))[0]


class FinalNorm(RMSNorm):
    """The norm before the head."""

    def __init__(self, config: Config):
        super().__init__(transformer_config(config), config.model.hidden_size, config.model.norm_epsilon)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens of a micro-batch: logits [S, B, V], labels [B, S]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.transpose(0, 1).flatten())


def layer_specs(config: Config) -> list:
    """The unrolled network: tied where the recursion plan visits a layer more than once."""
    plan = config.plan
    names = [name for name, _ in Block(config).named_parameters()]
    uses = [layer.physical for layer in plan.layers]
    blocks = [
        TiedLayerSpec(f"layer{physical}", Block, config, tied_weight_attr=names)
        if uses.count(physical) > 1
        else LayerSpec(Block, config)
        for physical in uses
    ]
    size = (config.model.vocab_size, config.model.hidden_size)
    return [
        TiedLayerSpec("embedding", Embedding, *size),
        *blocks,
        LayerSpec(FinalNorm, config),
        TiedLayerSpec("embedding", Embedding, *size, forward_fn=head),
    ]


def build_tied_pipeline(config: Config, micro_batches: int) -> PipelineEngine:
    """The pipeline over all processes, one stage each, in fp32 without ZeRO.

    Args:
        config: a validated configuration of a model without routing, with tied embeddings and a vocabulary that needs
            no padding; the process group exists.
        micro_batches: micro-batches of one iteration.
    """
    model, training = config.model, config.training
    assert config.recursion.routing == "none"
    assert not model.untie_embeddings_and_output_weights
    assert model.vocab_size % model.make_vocab_size_divisible_by == 0
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    with quiet():
        deepspeed.init_distributed(dist_init_required=False)
        module = PipelineModule(
            layer_specs(config),
            num_stages=deepspeed.comm.get_world_size(),
            loss_fn=cross_entropy,
            partition_method="type:Block",  # the same number of layers on each stage
        )
        initialize_weights(
            module, training.seed, model.init_method_std, model.vocab_size, _names_in_model(config, module)
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, config.optimizer),
            config={
                "train_micro_batch_size_per_gpu": training.micro_batch_size,
                "gradient_accumulation_steps": micro_batches,
                # Its norm would count a tied weight on every stage that has a copy.
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
            dist_init_required=False,
        )
    return engine


def train_iteration(engine: PipelineEngine, batches: list[Batch], lr: float) -> float:
    """One iteration over the micro-batches; the mean loss, on every rank."""
    set_learning_rate(engine.optimizer.param_groups, lr)
    with quiet():
        loss = engine.train_batch(iter([(batch.tokens, batch.labels) for batch in batches]))
    return float(loss)


@contextlib.contextmanager
def around_instruction(instruction: type, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace what DeepSpeed's engine does for one instruction of its schedule, for the duration of the block."""
    table = PipelineEngine._INSTRUCTION_MAP
    original = table[instruction]
    table[instruction] = wrap(original)
    try:
        yield
    finally:
        table[instruction] = original


def _names_in_model(config: Config, module: PipelineModule) -> dict[str, str]:
    """Name of each parameter here -> the name under which `MoRModel` draws its weights."""
    plan = config.plan
    names = {}
    for name, _ in module.named_parameters():
        place, _, rest = name.removeprefix("tied_modules.").partition(".")
        if place == "embedding":
            names[name] = "embedding.word_embeddings.weight"
        else:
            # An untied layer is named after its position, which counts the embedding.
            physical = place.removeprefix("layer") if "tied_modules" in name else None
            if physical is None and int(place) <= plan.num_layers:
                physical = str(plan.layers[int(place) - 1].physical)
            names[name] = f"layers.{physical}.{rest.removeprefix('layer.')}"
    return names
