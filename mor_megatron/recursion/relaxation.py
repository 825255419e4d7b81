"""Relaxation: recursions that differ although they share their weights (Relaxed Recursive Transformers, 2410.20672).

A linear map W of the shared block becomes W + s B_r A_r at recursion r: `Adapters` holds the factors and multiplies by
them. Beside these, norms may have weights of their own at each recursion, and a recursion may begin with a learned
vector. A relaxed model whose B is zero is the unrelaxed one.

How they are stored:

| what           | name and shape of its tensor                         | recursions                    | starts at |
|----------------|------------------------------------------------------|-------------------------------|-----------|
| A of part p    | `p_a` [n, R, in]                                     | `adapted(..)[p]`, n of them   | random    |
| B of part p    | `p_b` [n, R, out], transposed, so that it stacks     | the same                      | 0         |
| norm weight    | `weight` [Nr, H] in place of [H]                     | all                           | 1         |
| vector         | `weight` [Nr, H]                                     | all                           | 0         |

One tensor has all recursions. So its gradient exists whichever recursions ran, and rows of several recursions take one
product. The parts of a layer are q, k, v, o, gate, up, down (`PARTS`); those that read the same rows share one
`Adapters`. In an exported layer these are `self_attn.qkv_adapters`, `self_attn.o_adapters`, `mlp.gate_up_adapters` and
`mlp.down_adapters`. No name begins with `lora_`, by which PEFT knows its own tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mor_megatron.recursion.plan import RecursionPlan
from mor_megatron.recursion.setting import Change, setting

PARTS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""The linear maps of a layer, by the values of --lora-targets that take them in."""

_WITH_LORA = ("--relaxation lora", lambda settings: settings.relaxation == "lora")


@dataclass(frozen=True)
class RelaxationSettings:
    """How recursions differ from each other."""

    relaxation: Literal["none", "lora"] = setting("none", change=Change.FUNCTION)
    """lora: each recursion adds a low-rank product of its own to the linear maps of the shared block."""
    lora_rank: int = setting(64, least=1, change=Change.WEIGHTS, read_with=_WITH_LORA)
    """Rank R of these products."""
    lora_alpha: float | None = setting(None, above=0, change=Change.FUNCTION, read_with=_WITH_LORA)
    """They are scaled by alpha / R; default: R, which scales by 1 as the paper does."""
    lora_targets: Literal["attention", "mlp", "all"] = setting("all", change=Change.WEIGHTS, read_with=_WITH_LORA)
    """Linear maps that have them: q, k, v, o, or gate, up, down, or all seven. Where keys are read from recursion 0, k
    and v have none."""
    lora_recursions: Literal["all", "all_but_first"] = setting("all", change=Change.WEIGHTS, read_with=_WITH_LORA)
    """Recursions that have them: all, as in the paper, or all but the first, which is the shared block itself."""
    recursion_norms: bool = setting(False, change=Change.WEIGHTS)
    """Give the norms of the shared block weights of their own at each recursion."""
    recursion_embedding: bool = setting(False, change=Change.FUNCTION)
    """Add a learned vector of its own to the rows when a recursion opens."""

    @property
    def is_relaxed(self) -> bool:
        """Whether recursions differ in any way."""
        return self.relaxation != "none" or self.recursion_norms or self.recursion_embedding

    @property
    def lora_scale(self) -> float:
        """By which products of adapters are multiplied; `lora_alpha` is resolved."""
        return self.lora_alpha / self.lora_rank

    @property
    def differences(self) -> str:
        """What a recursion has of its own, in words; empty if nothing."""
        found = []
        if self.relaxation == "lora":
            maps = "all linear maps" if self.lora_targets == "all" else f"the linear maps of {self.lora_targets}"
            but = " (none in the first)" if self.lora_recursions == "all_but_first" else ""
            found.append(f"adapters of rank {self.lora_rank} on {maps}{but}")
        found += ["norm weights"] if self.recursion_norms else []
        found += ["a vector added at their start"] if self.recursion_embedding else []
        return ", ".join(found)


def resolve_relaxation(settings: RelaxationSettings, plan: RecursionPlan) -> RelaxationSettings:
    """`settings` with `lora_alpha` filled in.

    Raises:
        ValueError: there are no recursions to tell apart, or none that opens.
    """
    if settings.is_relaxed and plan.num_recursions == 1:
        values = {"relaxation": settings.relaxation} if settings.relaxation != "none" else {}
        values |= {"recursion-norms": settings.recursion_norms, "recursion-embedding": settings.recursion_embedding}
        shown = next(f"{name}={value}" for name, value in values.items() if value)
        raise ValueError(f"{shown} tells recursions apart, and there is one: give --num-recursions 2 or more")
    if settings.recursion_embedding and not plan.is_cyclic:
        raise ValueError(
            f"recursion-embedding=True needs recursions that open, and sharing-strategy={plan.strategy} repeats each "
            "layer by itself: use cycle or middle_cycle"
        )
    if settings.relaxation == "lora" and settings.lora_alpha is None:
        return replace(settings, lora_alpha=float(settings.lora_rank))
    return settings


def adapted(settings: RelaxationSettings, plan: RecursionPlan) -> dict[str, range]:
    """The parts of a shared layer that have adapters, each with its recursions; parts without any are left out."""
    if settings.relaxation == "none":
        return {}
    begin = 1 if settings.lora_recursions == "all_but_first" else 0
    chosen = PARTS if settings.lora_targets == "all" else (settings.lora_targets,)
    found = {}
    for part in (part for target in chosen for part in PARTS[target]):
        reads = plan.kv_mode == "sharing" and part in ("k", "v")
        recursions = range(begin, 1 if reads else plan.num_recursions)
        if recursions:
            found[part] = recursions
    return found


class Adapters(nn.Module):
    """Low-rank updates of linear maps that read the same rows, at each recursion.

    Args:
        settings: resolved; give rank and scale.
        recursions: from `adapted`; other parts have no update.
        inputs: width of the rows.
        outputs: width of each part's output, of the parts that read these rows.
        dtype: of the factors; None: torch's default. The model fills A, as it does all matrices.
    """

    def __init__(
        self,
        settings: RelaxationSettings,
        recursions: Mapping[str, range],
        inputs: int,
        outputs: Mapping[str, int],
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        rank = settings.lora_rank
        self.scale = settings.lora_scale
        self.recursions = {part: recursions[part] for part in outputs if part in recursions}
        for part, used in self.recursions.items():
            a = torch.empty(len(used), rank, inputs, dtype=dtype)
            b = torch.zeros(len(used), rank, outputs[part], dtype=dtype)
            self.register_parameter(f"{part}_a", nn.Parameter(a))
            self.register_parameter(f"{part}_b", keep_initial(nn.Parameter(b)))

    def factors(self, part: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [n, R, in] and B [n, R, out] of a part that has them."""
        return getattr(self, f"{part}_a"), getattr(self, f"{part}_b")

    def forward(
        self, rows: Tensor, recursion: int | Tensor, wanted: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Updates of the outputs.

        Args:
            rows: [.., in].
            recursion: of all rows; or of each of them, [..] int64, which takes one grouped product.
            wanted: parts; None: all.
        Returns:
            For each of these that has an update there, [.., out].
        """
        recursions = {part: used for part, used in self.recursions.items() if wanted is None or part in wanted}
        if isinstance(recursion, Tensor):
            return {part: self._grouped(part, rows, recursion) for part in recursions}
        parts = {part: recursion - used.start for part, used in recursions.items() if recursion in used}
        if not parts:
            return {}
        pairs = [[factor[i] for factor in self.factors(part)] for part, i in parts.items()]
        inner = self.exchange(self._scaled(rows @ torch.cat([a for a, _ in pairs]).t()))  # [.., parts * R]
        inners = inner.split([len(a) for a, _ in pairs], dim=-1)
        return {part: x @ b for part, x, (_, b) in zip(parts, inners, pairs, strict=True)}

    def exchange(self, inner: Tensor) -> Tensor:
        """What happens between the two products; overridden where ranks hold shares of a factor."""
        return inner

    def _grouped(self, part: str, rows: Tensor, recursion: Tensor) -> Tensor:
        a, b = self.factors(part)
        own = recursion.unsqueeze(-1) == torch.arange(len(a), device=rows.device) + self.recursions[part].start
        inner = self._scaled(rows @ a.flatten(0, 1).t()).unflatten(-1, (len(a), -1))  # [.., n, R]
        return (inner * own.unsqueeze(-1)).flatten(-2) @ b.flatten(0, 1)

    def _scaled(self, inner: Tensor) -> Tensor:
        return inner if self.scale == 1.0 else inner * self.scale


class RecursionEmbedding(nn.Module):
    """A learned vector for each recursion, added to the rows when it opens; zero at first."""

    def __init__(self, num_recursions: int, hidden_size: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = keep_initial(nn.Parameter(torch.zeros(num_recursions, hidden_size, dtype=dtype)))

    def forward(self, rows: Tensor, recursion: int | Tensor) -> Tensor:
        """[.., H] -> [.., H]; `recursion` is that of all rows, or of each, [..] int64."""
        return rows + self.weight[recursion]


def keep_initial(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter whose initial values are those that it has, though it is a matrix."""
    parameter.keeps_initial = True
    return parameter
