"""The next token of each sequence, from its logits and its own parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mor_megatron.serving.request import Logprob, Request, SamplingParams


def sample(logits: Tensor, requests: list[Request], ends: set[int]) -> list[int]:
    """Choose a token for each request.

    A request draws one number a token from its own generator, so its samples do not depend on what runs beside it.

    Args:
        logits: [n, V] of any type.
        ends: end-of-sequence tokens of the model.
    """
    logits = logits.float()
    if any(_has_penalty(request.params) or request.params.min_tokens for request in requests):
        logits = _penalized(logits, requests, ends)
    tokens = logits.argmax(1)
    drawn = [i for i, request in enumerate(requests) if request.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(logits[rows], [requests[i] for i in drawn])
    return tokens.tolist()


def logprobs_of(logits: Tensor, tokens: list[int], wanted: list[int | None]) -> list[Logprob | None]:
    """Log-probabilities of tokens [n], and of the most likely ones.

    Args:
        logits: [n, V].
        wanted: how many of the most likely tokens; None: nothing at all.
    """
    rows = [i for i, count in enumerate(wanted) if count is not None]
    result: list[Logprob | None] = [None] * len(tokens)
    if not rows:
        return result
    index = torch.tensor(rows, device=logits.device)
    values = logits[index].float().log_softmax(1)  # [n', V]
    own = values.gather(1, torch.tensor([[tokens[i]] for i in rows], device=logits.device)).squeeze(1).tolist()
    most = min(max(wanted[i] for i in rows), values.shape[1])
    best = values.topk(most, dim=1)
    for i, value, ids, tops in zip(rows, own, best.indices.tolist(), best.values.tolist(), strict=True):
        result[i] = Logprob(value, dict(list(zip(ids, tops, strict=True))[: wanted[i]]))
    return result


def _penalized(logits: Tensor, requests: list[Request], ends: set[int]) -> Tensor:
    """Logits after penalties, without what may not come yet."""
    rows = list(logits)
    for i, request in enumerate(requests):
        params = request.params
        if _has_penalty(params):
            rows[i] = _penalized_row(rows[i], request)
        if len(request.generated) < params.min_tokens:
            banned = {*params.stop_token_ids, *(() if params.ignore_eos else ends)}
            rows[i] = rows[i].index_fill(0, torch.tensor(sorted(banned), device=logits.device), -math.inf)
    return torch.stack(rows)


def _penalized_row(row: Tensor, request: Request) -> Tensor:
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(request.tokens)), device=row.device)
        values = row[seen]
        divided, multiplied = values / params.repetition_penalty, values * params.repetition_penalty
        row = row.index_copy(0, seen, torch.where(values > 0, divided, multiplied))
    if (params.presence_penalty or params.frequency_penalty) and request.generated:
        counts = torch.bincount(torch.tensor(request.generated, device=row.device), minlength=len(row))
        row = row - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return row


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _draw(logits: Tensor, requests: list[Request]) -> Tensor:
    """One token each, [n]; the order of the restrictions is that of transformers: top-k, top-p, min-p."""

    def column(name: str) -> Tensor:
        values = [getattr(request.params, name) for request in requests]
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    probabilities, order = (logits / column("temperature")).softmax(1).sort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    top_k = column("top_k")
    probabilities = probabilities.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    before = probabilities.cumsum(1) - probabilities
    outside = (before >= column("top_p")) | (probabilities < column("min_p") * probabilities[:, :1])
    probabilities = probabilities.masked_fill(outside & (rank > 0), 0.0).double()
    total = probabilities.cumsum(1)  # [n, V]
    drawn = torch.tensor([[request.random.random()] for request in requests], dtype=total.dtype, device=total.device)
    place = torch.searchsorted(total, drawn * total[:, -1:], right=True)
    return order.gather(1, place.clamp(max=logits.shape[1] - 1)).squeeze(1)
