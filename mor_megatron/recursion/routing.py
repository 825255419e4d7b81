"""What a routing method is, and the loop that every method shares.

    for each recursion r:
        open    decide which tokens are active, and take their rows out of the residual stream
        block   the shared layers, on those rows
        close   bring the rows back

The steps are separate because a pipeline runs them on different ranks, at different times. A `Layout` moves rows:
training has regular rows, and ragged rows for sets whose size is not known in advance (`recursion.dispatch`); an
exported model has packed rows (`rows_mor.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mor_megatron.recursion.context import MEAN_DEPTH, TOKENS_PER_RECURSION, RoutingContext
from mor_megatron.recursion.host import OnHost
from mor_megatron.recursion.plan import RecursionPlan, VirtualLayer
from mor_megatron.recursion.routers import GatingSettings

TIE = 1e-5
"""Router logits count as equal within TIE * (1 + their mean size in the sequence). Where a sequence begins with one
token repeated, hidden states are equal except for rounding, which depends on device and layout. Rounding moves fp32
logits by less than a tenth of this; within it, a sigmoid gate with alpha 0.1 changes by 2.5e-7."""

Index = Any
"""Positions of a subset among the rows of a set of active tokens, in the form that the `Layout` uses."""


def kept(capacity: float, length: int) -> int:
    """Tokens that a capacity keeps of a sequence."""
    return max(1, int(capacity * length))


ACTIVE = "active_{}"
"""Name in a trace of the mask of tokens that are active at a recursion."""


class Active(Protocol):
    """A set of tokens, in causal order within each sequence."""

    ragged: bool
    """Its sequences may have different numbers of tokens."""
    settled: bool
    """The host knows its tokens. Otherwise `count` is the most there can be."""

    @property
    def count(self) -> int:
        """Number of tokens in it."""


class Layout(Protocol):
    """Moves rows between the residual stream and sets of active tokens."""

    def gather(self, hidden: Tensor, active: Active) -> Tensor:
        """Rows of the active tokens, [.., H], out of the residual stream."""

    def combine(self, hidden: Tensor, rows: Tensor, gate: Tensor | None, active: Active) -> Tensor:
        """The residual stream with gate * rows, or rows, added at the active tokens; a gate is [.., 1]."""

    def take(self, rows: Tensor, active: Active, index: Index | None) -> Tensor:
        """The rows at `index` among those of the active tokens; all for None."""

    def collect(self, values: Tensor, active: Active) -> Tensor:
        """Values [.., W] of the rows that this rank has of `active` -> values of all its tokens, on every rank."""

    def at(self, values: Tensor, index: Index | None) -> Tensor:
        """Collected values [.., W] at `index`; all for None."""

    def of(self, values: Tensor, active: Active) -> Tensor:
        """One value for each token of the micro-batch -> those of the active tokens."""

    def counts(self, values: Tensor, active: Active, bins: int) -> Tensor:
        """Whole numbers below `bins`, one for each active token -> how many of each sequence have each, [B, bins]."""

    def to_host(self, values: Tensor, active: Active) -> OnHost | None:
        """Values about these tokens that the host will read; the copy starts at once. None: here the host reads nothing
        until it has opened several sets, and `keep` needs no lengths."""

    def keep(
        self, active: Active, mask: Tensor, lengths: tuple[int, ...] | None = None, regular: bool = False
    ) -> tuple[Active, Index | None]:
        """The subset where `mask` is true, and its index.

        Args:
            lengths: how many tokens of each sequence these are, if the host knows; otherwise it waits for the device.
            regular: every sequence keeps the same number of tokens.
        """

    def best(self, active: Active, scores: Tensor, capacity: float) -> tuple[Active, Index | None]:
        """The highest scores of each sequence: a fraction `capacity` of its length, and one at least. Among scores that
        are equal (`TIE`) at the cut, the earlier tokens."""

    def none(self, active: Active) -> Active:
        """The empty set."""

    def mask(self, active: Active) -> Tensor:
        """True at the active tokens, one value for each token of the micro-batch."""

    def means(self, values: Tensor, active: Active, per_sequence: bool) -> Tensor:
        """Mean over the tokens of each sequence or over all tokens, of collected values [.., W]."""


@dataclass(frozen=True)
class Stream:
    """State of a micro-batch between the steps of its recursions. Which fields are set depends on the step."""

    tokens: Active
    """All tokens of the micro-batch."""
    active: Active
    """Tokens of the open recursion, or the candidates of the next one."""
    hidden: Tensor | None = None
    """Residual stream of all tokens; None while `rows` are all there is (no routing)."""
    rows: Tensor | None = None
    """Working rows of the active tokens, [.., H]."""
    gate: Tensor | None = None
    """Weights of the rows when they come back, [.., 1]; None: they are added unweighted."""
    choice: Any = None
    """What the method decided once, for all recursions."""


@dataclass(frozen=True)
class Incoming:
    """What a pipeline rank knows of a recursion before its message arrives."""

    shape: tuple[int, int]
    """Leading dimensions of the working rows; the largest they can be."""
    decides: bool
    """The message carries a decision: a small whole number for each token, exact in bf16."""


@dataclass(frozen=True)
class NoSettings:
    """Settings of a routing method that has none."""


class RoutingMethod(nn.Module):
    """How deep each token goes. A method is a subclass in a file of its own, registered in `recursion.methods`.

    A subclass must define `name`, `about`, `build` and `open`. All other defaults are correct, though not the fastest,
    for every method that decides in `open`.

    Args:
        settings: has the fields of `Settings`, resolved.
        plan: gives Nr and the capacities.
        layout: moves rows; None if nothing is run.
    """

    name: ClassVar[str]
    """What users write: --routing NAME."""
    about: ClassVar[str]
    """One clause for a model card."""
    Settings: ClassVar[type] = NoSettings
    """Frozen dataclass of its settings: name, type, default, `--help` text; see `recursion.setting`."""
    routes: ClassVar[bool] = True
    """Tokens may leave before the last recursion."""
    looks_ahead: ClassVar[bool] = False
    """Selection by capacity compares later tokens, and so differs from the causal threshold of inference."""

    def __init__(self, settings: Any, plan: RecursionPlan, layout: Layout | None = None):
        super().__init__()
        self.settings, self.plan, self.layout = settings, plan, layout

    # Description, without weights.

    @classmethod
    def resolve(cls, settings: Any, num_recursions: int) -> Any:
        """`settings` with defaults filled in.

        Raises:
            ValueError: a value does not fit; the message names the setting, its value and a remedy.
        """
        return settings

    @classmethod
    def capacities(cls, settings: Any, num_recursions: int) -> tuple[float, ...]:
        """Fraction of tokens that the plan allows at each recursion; non-increasing, the first 1."""
        return (1.0,) * num_recursions

    @classmethod
    def static_from(cls, settings: Any) -> int | None:
        """Iteration from which every training pass has the same shapes and leaves nothing to the host, so that a CUDA
        graph of one micro-batch stands for all; default None: never."""
        return None

    @classmethod
    def warnings(cls, settings: Any) -> list[str]:
        """Messages about what valid settings leave untrained."""
        return []

    @classmethod
    def untrained(cls, settings: Any) -> str | None:
        """Why valid settings give none of its weights a gradient, and a remedy; default None: one has a gradient."""
        return None

    def metric_names(self) -> tuple[str, ...]:
        """What a training pass reports, in the order of the log line; the same on every rank of a pipeline."""
        return (*(TOKENS_PER_RECURSION.format(r) for r in range(self.plan.num_recursions)), MEAN_DEPTH)

    @property
    def weighs(self) -> bool:
        """Whether `open` sets a gate; default: what --router-gating says where the method has that setting."""
        return self._gating in ("weighted", "residual")

    @property
    def _gating(self) -> str | None:
        return self.settings.router_gating if issubclass(self.Settings, GatingSettings) else None

    @property
    def threshold_routers(self) -> Sequence[nn.Module]:
        """For each recursion, the module whose logits the causal threshold reads, [candidates, 1]; default: none."""
        return ()

    def planned_fractions(self) -> tuple[float, ...]:
        """Fraction of tokens expected at each recursion: what FLOPs are counted by before anything was measured."""
        return self.plan.capacities

    def flops_per_token(self, parameters: int, fractions: Sequence[float]) -> float:
        """Forward FLOPs a token of the routers.

        Args:
            parameters: weights of all routers.
            fractions: of tokens active at each recursion, [Nr].
        """
        return 2.0 * parameters

    # Computation.

    def build(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Create the routers, and buffers that start at 0. Called on the first rank of a pipeline only.

        The model fills parameters of two or more dimensions, like all of its weights; those of fewer keep the values
        they are given here, which must be the same on every rank. A parameter belongs to a submodule that `open` calls,
        and that maps rows to values (`Router` does): ZeRO-3 gathers it there. Under sequence parallelism a rank has the
        rows of its own tokens only, and what is computed from them has to go through `layout.collect`.

        Args:
            hidden_size: H.
            dtype: type of parameters.
        """

    def forward(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Open recursion r: `open`, checked and reported. No token is active beyond a fixed depth.

        Callers call the module instead of `open`, so that hooks that offload its buffers run.
        """
        if r >= context.depth(self.plan.num_recursions):
            return replace(stream, active=self.layout.none(stream.active), rows=stream.hidden[:0], gate=None)
        opened = self.open(r, stream, context)
        self._check(r, stream, opened, context)
        self.report_tokens(r, opened, context)
        return opened

    def _check(self, r: int, stream: Stream, opened: Stream, context: RoutingContext) -> None:
        """Refuse what would compute something else in a pipeline, with shared keys or with a cache."""
        if (opened.gate is not None) != self.weighs:
            raise ValueError(
                f"routing={self.name} opens recursion {r} with gate={'a tensor' if opened.gate is not None else None}, "
                f"but its weighs={self.weighs}: let `weighs` say whether `open` sets a gate"
            )
        count, candidates = opened.active.count, stream.active.count
        comes_back = opened.active.settled and count > candidates
        if comes_back or (count < candidates and (r == 0 or context.fixed_depth is not None)):
            raise ValueError(
                f"routing={self.name} opens recursion {r} with {count} of {candidates} candidates: recursion 0 and a "
                "fixed depth take every token, and a token that left does not come back"
            )

    def open(self, r: int, stream: Stream, context: RoutingContext) -> Stream:
        """Decide on recursion r.

        Args:
            r: recursion, below the fixed depth if there is one.
            stream: `active` are the candidates (at r=0, all tokens), `hidden` is the residual stream.
        Returns:
            The stream with `active`, `rows` and, if the method weighs, `gate` set. All tokens are active at recursion 0
            and with a fixed depth. Otherwise the active tokens are a subset of the candidates: a token that has
            left does not come back.
        """
        raise NotImplementedError

    def report_tokens(self, r: int, stream: Stream, context: RoutingContext) -> None:
        """Report the fraction of active tokens to `context`."""
        fraction = stream.active.count / stream.tokens.count
        context.report_fraction(TOKENS_PER_RECURSION.format(r), fraction, stream.rows.device)
        context.report_fraction(MEAN_DEPTH, fraction, stream.rows.device)

    def close(self, r: int, stream: Stream) -> Stream:
        """Bring back the rows that leave after recursion r; default: all of them.

        Not called after the last recursion that runs: there all rows come back (`merged`), in a pipeline on a rank
        without the routers.
        """
        return self.merged(stream)

    def merged(self, stream: Stream) -> Stream:
        """All rows brought back. The active set stays."""
        hidden = stream.hidden
        if hidden is None:
            hidden = stream.rows
        elif stream.active.count > 0:
            hidden = self.combine(hidden, stream.rows, stream.gate, stream.active)
        return replace(stream, hidden=hidden, rows=None, gate=None)

    def combine(self, hidden: Tensor, rows: Tensor, gate: Tensor | None, active: Active) -> Tensor:
        """The residual stream with what the block made of active tokens brought back, as --router-gating says.

        Args:
            hidden: residual stream of all tokens, as the block found it at the active ones.
            rows: output of the block, which contains its input, [.., H].
            gate: weights of the rows, [.., 1]; None: 1.
        """
        if self._gating == "residual":
            rows = rows - self.layout.gather(hidden, active)
        return self.layout.combine(hidden, rows, gate, active)

    def after_step(self, metrics: dict[str, Tensor | float], iteration: int) -> None:
        """After an applied optimizer step, with the means of the metrics over the global batch."""

    def passes(self, depth: int) -> tuple[tuple[VirtualLayer, ...], ...]:
        """Virtual layers between two decisions, for the first `depth` recursions."""
        return tuple(self.plan.pass_layers(r) for r in range(depth))

    # What travels with the rows in a pipeline. Decisions are taken by its first rank.

    def incoming(self, r: int, tokens: Any, choice: Any, context: RoutingContext) -> Incoming:
        """What is known of recursion r before its message arrives; default: only whether a fixed depth ends before it.

        Args:
            tokens: all tokens of the micro-batch.
            choice: as in `Stream`, as far as it is known on this rank.
        """
        if r >= context.depth(self.plan.num_recursions):
            return Incoming((0, 1), decides=False)
        return Incoming((tokens.count, 1), decides=True)

    def decision(self, stream: Stream) -> Tensor:
        """What the message of an open recursion tells other ranks, [S, B]: small whole numbers. Default: which tokens
        are active, 1 in ragged rows, 2 in regular ones."""
        return self.layout.mask(stream.active).int() * (1 if stream.active.ragged else 2)

    def receive(
        self, r: int, tokens: Any, choice: Any, decision: Tensor | None, context: RoutingContext
    ) -> tuple[Active, Any]:
        """The active tokens of recursion r, and the choice, on a rank that receives them: the inverse of `decision`.

        Args:
            decision: [S, B]; None if `incoming` says that there is none. Default: no token is active then.
        """
        if decision is None:
            return self.layout.none(tokens), choice
        counts = self.layout.counts(decision.round().long(), tokens, 3).tolist()
        out, ragged, even = zip(*counts, strict=True)  # tokens of each sequence
        regular = any(even)
        if regular and not any(out):
            return tokens, choice
        lengths = even if regular else ragged
        return self.layout.keep(tokens, decision > 0.5, lengths, regular)[0], choice


def run_recursions(
    method: RoutingMethod,
    stream: Stream,
    run: Callable[[tuple[VirtualLayer, ...], Stream], Tensor],
    context: RoutingContext,
    idle: Callable[[tuple[VirtualLayer, ...], Stream], Stream] | None = None,
) -> Stream:
    """All recursions on one rank.

    Args:
        stream: with the residual stream of all tokens.
        run: one pass over some layers: an open recursion -> its new rows.
        idle: what to do in a recursion without active tokens; default nothing.
    Returns:
        The stream with its last recursion open: `merged` closes it.
    """
    passes = method.passes(context.depth(method.plan.num_recursions))
    for r, layers in enumerate(passes):
        if r > 0:
            stream = method.close(r - 1, stream)
            if stream.active.count == 0 and context.metrics is None and idle is None:
                break  # what follows would only be reported
        stream = method(r, stream, context)
        if method.routes and context.trace is not None:
            context.record(ACTIVE.format(r), method.layout.mask(stream.active))
        if stream.active.count > 0:
            stream = replace(stream, rows=run(layers, stream))
        elif idle is not None:
            stream = idle(layers, stream)
    return stream
