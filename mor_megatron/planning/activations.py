"""Bytes that the forward pass of a micro-batch leaves on a rank for the backward pass, and what that adds in passing.

What one use of a layer keeps for each of its rows, without recomputation. T are the tensor-parallel ranks, t as many
under sequence parallelism and else 1; Q and KV are the widths of all queries and of all keys.

| kept                                                | numbers of w bytes | of 4 bytes |
|-----------------------------------------------------|--------------------|------------|
| inputs of both halves of the layer, norms' outputs  | 4 H / t            | 2 / t      |
| queries, and keys and values where they are its own | (Q + 2 KV) / T     |            |
| attention's output                                  | Q / T              | heads / T  |
| product of gate and up, activation                  | 3 F / T            |            |
| between the products of each adapter                | R                  |            |

A routed recursion also keeps the rows of its candidates, which its router reads in fp32, and its output, which the gate
weighs. Recomputation keeps the input of every layer or pass, and keys that later recursions share; what it forgot comes
back, a layer or a pass at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mor_megatron.config.schema import Config
from mor_megatron.planning.accounting import (
    Widths,
    active_fraction,
    adapted_maps,
    is_reached,
    padded_vocab_size,
    planned_fractions,
    skips_keys,
)
from mor_megatron.planning.stages import PipelinePlan
from mor_megatron.recursion.plan import VirtualLayer

LOGITS_AT_ONCE = {False: 2**23, True: 2**28}
"""Logits of a chunk on a CPU, whose caches hold part of them, and with CUDA, where a chunk has to occupy the device."""

Uses = list[tuple[VirtualLayer, float]]
"""Layers in the order of execution, and the rows that each processes."""


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one rank, in bytes."""

    kept: tuple[float, ...]
    """Between the forward and the backward pass of each recursion, [Nr]; a unique layer counts to the nearest one."""
    working: tuple[float, ...]
    """The most that the backward pass of each recursion adds, [Nr]."""


def activations(config: Config, pipeline: PipelinePlan, stage: int, cuda: bool) -> Activations:
    """What a micro-batch keeps on each rank of a pipeline stage, with the planned number of tokens a recursion.

    Args:
        cuda: whether the rank has a CUDA device; without one, attention to shared keys keeps its mask.
    """
    rows = _Rows(config, cuda)
    tokens = rows.tokens
    fractions, count = planned_fractions(config), config.recursion.num_recursions
    uses: list[Uses] = [[] for _ in range(count)]
    # Without routing, recomputation takes all recursions of a rank as one pass.
    is_one_pass = not (config.routing_method.routes or pipeline.is_ring) and _recomputes(config) == "recursion"
    for chunk in range(pipeline.num_chunks):
        for layer in pipeline.layers(stage, chunk):
            if not is_reached(config, layer):
                continue
            unique = 0 if layer in pipeline.plan.first else count - 1
            recursion = unique if layer.recursion is None else layer.recursion
            if is_one_pass and layer.recursion is not None:
                recursion = count - 1
            uses[recursion].append((layer, tokens * active_fraction(layer, fractions)))
    kept = [rows.kept(own) for own in uses]
    if stage == 0:
        kept = [size + rows.routed(tokens, fractions, r) for r, size in enumerate(kept)]
    working = [rows.working(own) for own in uses]
    if rows.shares:  # gradients of the keys of recursion 0, until its own backward pass
        block = len(pipeline.physical_layers(stage))
        working = [size + (tokens * rows.keys * block if r < count - 1 else 0) for r, size in enumerate(working)]
    return Activations(tuple(kept), tuple(working))


def adds_each_use(config: Config) -> bool:
    """Whether each use of a weight adds to the iteration's gradient by itself (training/modes/uses.py)."""
    training = config.training
    return training.bf16 and training.zero_stage <= 1 and not training.optimizer_cpu_offload


def forward_bytes(config: Config, cuda: bool) -> float:
    """The most that a forward pass without gradients has at once, which is in a feed-forward network."""
    rows = _Rows(config, cuda)
    gated = 3 if cuda else 4  # gate, up and their product; without a kernel, the gate's activation by itself
    return rows.tokens * (2 * rows.stream + rows.whole_stream + gated * rows.ffn)


def final_norm_bytes(config: Config, cuda: bool) -> float:
    """Of a micro-batch: what the norm before the head reads and gives."""
    rows = _Rows(config, cuda)
    return rows.tokens * (2 * rows.stream + rows.norms / 2)


def head_bytes(config: Config, cuda: bool, teacher: Config | None = None) -> float:
    """Final norm, head and loss of a micro-batch on the last stage, without the gradient of the head's weight.

    Args:
        teacher: of `teacher.beside`; its logits are compared, a chunk at a time.
    """
    rows, chunk = _Rows(config, cuda), loss_chunk_rows(config, cuda)
    tokens = rows.tokens
    norm = final_norm_bytes(config, cuda)
    if teacher is not None:
        chunk = chunk or tokens
        norm += tokens * (_Rows(teacher, cuda).whole_stream + 8)  # what its head reads; two losses of each token
    if chunk > 0 and (cuda or chunk < tokens or teacher is not None):
        gathered = rows.whole_stream if rows.stream < rows.whole_stream else 0
        at_once = min(chunk, tokens)
        wide = 0.0
        if (
            rows.number < 4 and not cuda
        ):  # no kernel reads 16 bits: a chunk's logits in fp32, or its part of the gradient
            wide = rows.vocabulary * max(4.0 * at_once, rows.number * config.model.hidden_size)
        if teacher is not None:
            wide = max(wide, at_once * rows.vocabulary * _comparing(rows.number, cuda))
        return norm + tokens * (rows.whole_stream + gathered) + at_once * rows.vocabulary * rows.number + wide
    in_16_bits = rows.number if rows.number < 4 else 0
    return norm + tokens * rows.vocabulary * (4 + in_16_bits)  # fp32 logits become their gradient in place


def _comparing(number: int, cuda: bool) -> int:
    """Bytes that comparing one logit with a teacher's adds to the model's own."""
    if cuda:
        return number
    copies = 0 if number == 4 else 4 + number  # both in fp32 beside their 16 bits
    return copies + 4 * 4  # the teacher's, their difference, two exponentials


def loss_chunk_rows(config: Config, cuda: bool) -> int:
    """Rows of head and loss at once: `loss_chunk_rows`, or about as many as make `LOGITS_AT_ONCE`; 0: all."""
    if config.training.loss_chunk_rows is not None:
        return config.training.loss_chunk_rows
    return 2 ** int(math.log2(max(1, LOGITS_AT_ONCE[cuda] // _Rows(config, cuda).vocabulary)))


def _recomputes(config: Config) -> str | None:
    """The unit of full recomputation; None without it."""
    return config.training.recompute_unit if config.training.recompute_granularity == "full" else None


class _Rows:
    """Bytes a row on one tensor-parallel rank, by the table above."""

    def __init__(self, config: Config, cuda: bool):
        self.config, self.plan, self.training = config, config.plan, config.training
        self.tokens = self.training.micro_batch_size * config.data.seq_length
        self.is_cuda = cuda
        widths, parallel = Widths.of(config), config.parallel
        tp = parallel.tensor_model_parallel_size
        cut = tp if parallel.sequence_parallel else 1
        self.number = 2 if self.training.precision != "fp32" else 4
        self.stream = self.number * widths.hidden / cut  # a row of the residual stream
        self.whole_stream = self.number * widths.hidden  # the same where the shards are gathered
        self.queries, self.keys = self.number * widths.query / tp, 2 * self.number * widths.key_value / tp
        self.ffn = self.number * widths.ffn / tp
        self.rank = self.number * config.recursion.lora_rank
        self.norms, self.softmax = 8 / cut, 4 * config.model.num_attention_heads / tp
        self.hidden_fp32 = 4 * widths.hidden / cut
        self.largest_weight = 2 * widths.hidden * widths.ffn / tp
        vocabulary = padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by, tp)
        self.vocabulary = vocabulary // tp
        self.shares = self.plan.kv_mode != "caching"

    def whole(self, layer: VirtualLayer, rows: float) -> float:
        """All of one use."""
        own_keys = 0 if skips_keys(self.plan, layer) else self.keys
        attention = 2 * self.queries + own_keys + self.softmax
        replaced = 0.0  # keys of all tokens, in which the layer has put its own
        if layer.kv_source != layer.index and rows < self.tokens:
            attention += 0 if self.is_cuda else self.queries  # computed in blocks of rows, then put together
            replaced = self.tokens * self.keys if self.plan.kv_mode == "sharing_update" else 0.0
        adapters = self.rank * len(adapted_maps(self.config, layer))
        return rows * (4 * self.stream + self.norms + attention + 3 * self.ffn + adapters) + replaced

    def kept(self, uses: Uses) -> float:
        """What the uses of a recursion keep, as `recompute_granularity` has it."""
        mask = self.mask(uses)
        if _recomputes(self.config) is None:
            forgotten = self.softmax if self.training.recompute_granularity == "selective" else 0
            return mask + sum(self.whole(layer, rows) - forgotten * rows for layer, rows in uses)
        stored = sum(rows * self.keys for layer, rows in uses if self.shares and layer.recursion == 0)
        return mask + stored + sum(self.stream * region[0][1] for region in self._regions(uses))

    def mask(self, uses: Uses) -> float:
        """Which of all keys each row sees, once a pass; a GPU's kernels take ranges instead."""
        rows = [rows for layer, rows in uses if layer.kv_source != layer.index and rows < self.tokens]
        return rows[0] * self.config.data.seq_length * self.number if rows and not self.is_cuda else 0.0

    def working(self, uses: Uses) -> float:
        """The most that the backward pass of a recursion adds, which is in its largest region."""
        if not uses:
            return 0.0
        again = 0.0
        if _recomputes(self.config) is not None:
            again = max(sum(self.whole(*use) for use in region) for region in self._regions(uses))
        rows = max(rows for _, rows in uses)
        # Gradients of a row in SwiGLU, two of the product and two to work with, less the activation just used; or of
        # the weight before it, first in the type of the run, then in fp32.
        activation = rows * (self.stream + 3 * self.ffn)
        cast = 4 if self.number < 4 else 0
        gathered = self.whole_stream if self.stream < self.whole_stream else 0
        weight = rows * (self.stream + self.whole_stream + gathered + self.ffn)
        adds = self.is_cuda and adds_each_use(self.config)  # the product itself adds to the sum
        if not adds and self.config.optimizer.freeze == "none":
            weight += self.largest_weight * (self.number + cast)
        return again + max(activation, weight)

    def _regions(self, uses: Uses) -> list[Uses]:
        """What recomputation brings back at once: a layer, or a pass."""
        if _recomputes(self.config) == "layer":
            return [[use] for use in uses]
        unique = [[use] for use in uses if use[0].recursion is None]
        shared = [use for use in uses if use[0].recursion is not None]
        return [*unique, shared] if shared else unique

    def routed(self, tokens: float, fractions: tuple[float, ...], recursion: int) -> float:
        """Of opening and closing a recursion, on the first stage."""
        method = self.config.routing_method
        if not method.routes:
            return 0.0
        candidates = tokens * fractions[recursion - 1] * self.stream if recursion > 0 else 0.0
        if self.number < 4:
            candidates += tokens * (fractions[recursion - 1] if recursion > 0 else 1.0) * self.hidden_fp32
        return candidates + (tokens * fractions[recursion] * self.stream if method.weighs else 0.0)
