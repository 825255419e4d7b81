"""The next token of each sequence, from its logits and its own parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mor_megatron.serving.request import Logprob, Request, SamplingParams

LEAST_TEMPERATURE = 1e-6
"""Lower ones are taken for this, with which the most likely token is certain: the quotient must be finite."""


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
            index = torch.tensor(sorted(banned), dtype=torch.int64, device=logits.device)
            rows[i] = rows[i].index_fill(0, index, -math.inf)
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
    """One token each, [n]."""
    tokens = logits.new_empty(len(requests), dtype=torch.int64)
    cut = [_is_cut(request.params) for request in requests]
    for is_cut, weights in (False, _weights), (True, _cut_weights):
        mine = [i for i, value in enumerate(cut) if value == is_cut]  # a request goes one way, whatever is beside it
        if mine:
            rows, own = torch.tensor(mine, device=logits.device), [requests[i] for i in mine]
            temperature = _column("temperature", own, logits).clamp(min=LEAST_TEMPERATURE)
            values, order = weights(logits[rows] / temperature, own)
            total = values.double().cumsum(1)  # [n', V]
            drawn = torch.tensor([[request.random.random()] for request in own], dtype=total.dtype, device=total.device)
            place = torch.searchsorted(total, drawn * total[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
            tokens[rows] = (place if order is None else order.gather(1, place)).squeeze(1)
    return tokens


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _weights(logits: Tensor, requests: list[Request]) -> tuple[Tensor, None]:
    """Probabilities [n, V]."""
    return logits.softmax(1), None


def _cut_weights(logits: Tensor, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """Probabilities of what top-k, then top-p, then min-p leave, as transformers orders them; the largest first,
    [n, V], and the tokens that have them."""
    probabilities, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    size = logits.shape[1]
    rank = torch.arange(size, device=logits.device)
    top_k = torch.tensor([[min(request.params.top_k, size)] for request in requests], device=logits.device)
    probabilities = probabilities.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    before = probabilities.cumsum(1) - probabilities
    least = _column("min_p", requests, logits) * probabilities[:, :1]
    outside = (before >= _column("top_p", requests, logits)) | (probabilities < least)
    return probabilities.masked_fill(outside & (rank > 0), 0.0), order


def _column(name: str, requests: list[Request], like: Tensor) -> Tensor:
    """A parameter of each request, [n, 1]."""
    return torch.tensor([[getattr(request.params, name)] for request in requests], device=like.device)
