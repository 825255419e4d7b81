"""The element-wise parts of a layer, one Triton kernel each way. `elementwise` defines them and chooses this on CUDA.

Each kernel reads its inputs once, computes in fp32 and rounds its results once. No choice of block sizes is timed:
they follow from the width. Torch's own `F.rms_norm` is one kernel as well, but rounds after the weight, not before it.
Stands alone and needs Triton, so that it is imported where it is used only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 1024
"""Elements of a row per program, where a row is divided among programs."""
PROGRAMS_PER_PROCESSOR = 8
"""Of the backward pass of RMSNorm, which has each program walk over many rows: enough to hide the memory's latency."""


@triton.jit
def _norm_forward(x, update, total, weight, out, rstd, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)  # the norm is of the sum as it is stored
        tl.store(total + place, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    normal = (value * scale).to(out.dtype.element_ty).to(tl.float32)  # rounded before the weight
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normal * factor, mask=inside)


@triton.jit
def _norm_backward(
    grad, grad_total, total, weight, rstd, grad_x, partial, rows, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for each in range(ROWS):
        row = program * ROWS + each
        place = row * width + column
        real = inside & (row < rows)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.load(total + place, mask=real, other=0.0).to(tl.float32) * scale
        change = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
        grad_weight += change * normal
        change *= factor
        along = tl.sum(change * normal, axis=0) / width
        change = (change - along * normal) * scale
        if ADD:
            change += tl.load(grad_total + place, mask=real, other=0.0).to(tl.float32)
        tl.store(grad_x + place, change, mask=real)
    tl.store(partial + program * width + column, grad_weight, mask=inside)


class AddNormFunction(torch.autograd.Function):
    """x + update, and its norm; see `elementwise.add_norm`. Backward adds what comes along the sum in the same pass.

    The weight's gradient is a sum of partial sums, and so reproducible.
    """

    @staticmethod
    def forward(ctx, x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dense = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(dense)
        total, added = x, dense
        if update is not None:
            total, added = torch.empty_like(dense), update.contiguous()
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows > 0:
            _norm_forward[(rows,)](
                dense, added, total, weight, out, rstd, width, eps, ADD=update is not None, **_whole_row(width)
            )
        ctx.save_for_backward(dense if update is None else total, weight, rstd)
        ctx.adds = update is not None
        return total, out

    @staticmethod
    def backward(ctx, grad_total: Tensor | None, grad: Tensor | None):
        total, weight, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None
        grad = grad.contiguous()
        along = grad if grad_total is None else grad_total.contiguous()
        rows, width = rstd.numel(), total.shape[-1]
        grad_x = torch.empty_like(total)
        # A power of two, so that ragged numbers of rows do not compile a kernel each.
        each = triton.next_power_of_2(triton.cdiv(rows, PROGRAMS_PER_PROCESSOR * _processors(total.device)))
        programs = triton.cdiv(rows, max(1, each))
        partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
        if rows > 0:
            _norm_backward[(programs,)](
                grad, along, total, weight, rstd, grad_x, partial, rows, width,
                ADD=grad_total is not None, ROWS=each, **_whole_row(width),
            )  # fmt: skip
        return grad_x, grad_x if ctx.adds else None, partial.sum(0).to(weight.dtype), None


@triton.jit
def _swiglu_forward(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * 2 * width + column
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(grad, x, grad_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * 2 * width + column
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + width, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_x + place, change * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(grad_x + place + width, change * gate * sigmoid, mask=inside)


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up of [.., 2F] = (gate, up); keeps only its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        if out.numel() > 0:
            grid, block = _parts_of_rows(out.numel() // width, width)
            _swiglu_forward[grid](x, out, width, **block)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        width = grad.shape[-1]
        grad_x = torch.empty_like(x)
        if grad.numel() > 0:
            grid, block = _parts_of_rows(grad.numel() // width, width)
            _swiglu_backward[grid](grad, x, grad_x, width, **block)
        return grad_x


@triton.jit
def _rotate(
    mixed, q, k, v, cos, sin, columns, heads,
    q_row, q_column, q_head, k_row, k_column, k_head, v_row, v_column, v_head, angle_row, angle_column,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr, INVERSE: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """mixed [R*C, heads, 2*HALF] -> rotated q, rotated k, v; INVERSE: gradients of these -> that of mixed.

    Without SPLIT all heads are queries. q, k, v are addressed by their strides; the last dim is dense in all.
    """
    token = tl.program_id(0).to(tl.int64)
    row, column = token // columns, token % columns
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK)
    angle = row * angle_row + column * angle_column + half
    c = tl.load(cos + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s  # the inverse of a rotation
    inside = (head < heads)[:, None] & (half < HALF)[None, :]
    first = mixed + (token * heads + head)[:, None] * (2 * HALF) + half[None, :]
    query, is_query = head, inside
    if SPLIT:
        group, part = head // (QUERIES + 2), head % (QUERIES + 2)
        query = group * QUERIES + part
        is_query = inside & (part < QUERIES)[:, None]
        is_key = inside & (part == QUERIES)[:, None]
        is_value = inside & (part == QUERIES + 1)[:, None]
        to_key = k + row * k_row + column * k_column + group[:, None] * k_head + half[None, :]
        to_value = v + row * v_row + column * v_column + group[:, None] * v_head + half[None, :]
        c = tl.where((part == QUERIES + 1)[:, None], 1.0, c)
        s = tl.where((part == QUERIES + 1)[:, None], 0.0, s)
    to_query = q + row * q_row + column * q_column + query[:, None] * q_head + half[None, :]
    if INVERSE:
        x1 = tl.load(to_query, mask=is_query, other=0.0).to(tl.float32)
        x2 = tl.load(to_query + HALF, mask=is_query, other=0.0).to(tl.float32)
        if SPLIT:  # each head is read in one of three places, and 0 in the others
            x1 += tl.load(to_key, mask=is_key, other=0.0).to(tl.float32)
            x2 += tl.load(to_key + HALF, mask=is_key, other=0.0).to(tl.float32)
            x1 += tl.load(to_value, mask=is_value, other=0.0).to(tl.float32)
            x2 += tl.load(to_value + HALF, mask=is_value, other=0.0).to(tl.float32)
    else:
        x1 = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
    if INVERSE:
        tl.store(first, y1, mask=inside)
        tl.store(first + HALF, y2, mask=inside)
    else:
        tl.store(to_query, y1, mask=is_query)
        tl.store(to_query + HALF, y2, mask=is_query)
        if SPLIT:
            tl.store(to_key, y1, mask=is_key)
            tl.store(to_key + HALF, y2, mask=is_key)
            tl.store(to_value, y1, mask=is_value)
            tl.store(to_value + HALF, y2, mask=is_value)


def _launch_rotate(mixed: Tensor, parts: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """mixed [R, C, heads, D] dense, parts q or q, k, v [R, C, .., D], cos and sin [R, C or 1, D/2]."""
    rows, columns, heads, width = mixed.shape
    if mixed.numel() == 0:
        return
    split = len(parts) == 3
    groups = parts[1].shape[2] if split else heads
    block = triton.next_power_of_2(width // 2)
    heads_at_once = min(triton.next_power_of_2(heads), max(1, LARGEST_BLOCK // block))
    strides = [stride for part in (parts if split else 3 * parts) for stride in part.stride()[:3]]
    grid = rows * columns, triton.cdiv(heads, heads_at_once)
    _rotate[grid](
        mixed, *(parts if split else 3 * parts), cos, sin, columns, heads,
        *strides, cos.stride(0), 0 if cos.shape[1] == 1 else cos.stride(1),
        QUERIES=heads // groups - 2 if split else 1, SPLIT=split, INVERSE=inverse,
        HALF=width // 2, BLOCK=block, HEADS=heads_at_once, num_warps=4,
    )  # fmt: skip


class SplitRotateFunction(torch.autograd.Function):
    """Mixed qkv -> rotated q, rotated k, v; see `elementwise.split_rotate`."""

    @staticmethod
    def forward(ctx, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = _angles(cos), _angles(sin)
        ctx.save_for_backward(cos, sin)
        rows, columns, groups, heads, width = mixed.shape
        q = mixed.new_empty(rows, columns, groups * (heads - 2), width)
        k, v = (mixed.new_empty(rows, columns, groups, width) for _ in range(2))
        _launch_rotate(mixed.contiguous().flatten(2, 3), [q, k, v], cos, sin, inverse=False)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        grads = [_dense_rows(grad) for grad in grads]
        rows, columns, groups, width = grads[1].shape
        heads = grads[0].shape[2] // groups + 2
        grad = grads[0].new_empty(rows, columns, groups, heads, width)
        _launch_rotate(grad.flatten(2, 3), grads, cos, sin, inverse=True)
        return grad, None, None


class RotateFunction(torch.autograd.Function):
    """RoPE on x [R, C, N, D] alone; cos, sin [R, C or 1, 1, D/2]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = _angles(cos), _angles(sin)
        ctx.save_for_backward(cos, sin)
        x = x.contiguous()
        out = torch.empty_like(x)
        _launch_rotate(x, [out], cos, sin, inverse=False)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        grad = _dense_rows(grad)
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _launch_rotate(out, [grad], cos, sin, inverse=True)
        return out, None, None


@triton.jit
def _add_rows_forward(
    base, update, gate, place, out, width, GATED: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(base + row * width + column, mask=inside, other=0.0).to(tl.float32)
    source = row
    if not ALL:
        source = tl.load(place + row).to(tl.int64)
    chosen = source >= 0
    change = tl.load(update + source * width + column, mask=inside & chosen, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + source, mask=chosen, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value + change, mask=inside)


@triton.jit
def _add_rows_backward(
    grad, update, gate, index, grad_update, grad_gate, width, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = row
    if not ALL:
        source = tl.load(index + row)
    change = tl.load(grad + source * width + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(update + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_update + row * width + column, change * tl.load(gate + row).to(tl.float32), mask=inside)
    tl.store(grad_gate + row, tl.sum(change * value, axis=0))


class AddRowsFunction(torch.autograd.Function):
    """base with gate * update added at `index`; see `elementwise.add_rows`."""

    @staticmethod
    def forward(ctx, base: Tensor, update: Tensor, gate: Tensor | None, index: Tensor | None) -> Tensor:
        base, update = base.contiguous(), update.contiguous()
        gate = None if gate is None else gate.contiguous()
        ctx.save_for_backward(update if gate is not None else None, gate, index)
        rows, width = base.shape
        out = torch.empty_like(base)
        place = None
        if index is not None:  # for each row of the base its row of the update, so that every row is written once
            place = torch.full((rows,), -1, dtype=torch.int32, device=base.device)
            place.index_copy_(0, index, torch.arange(index.numel(), dtype=torch.int32, device=base.device))
        if rows > 0:
            grid, block = _parts_of_rows(rows, width)
            options = {"GATED": gate is not None, "ALL": index is None}
            _add_rows_forward[grid](
                base, update, base if gate is None else gate, base if place is None else place, out, width,
                **options, **block,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        update, gate, index = ctx.saved_tensors
        if gate is None:
            return grad, grad if index is None else grad.index_select(0, index), None, None
        dense = grad.contiguous()
        rows, width = update.shape
        grad_update, grad_gate = torch.empty_like(update), torch.empty_like(gate)
        if rows > 0:
            _add_rows_backward[(rows,)](
                dense, update, gate, dense if index is None else index, grad_update, grad_gate, width,
                ALL=index is None, **_whole_row(width),
            )  # fmt: skip
        return grad, grad_update, grad_gate, None


def _whole_row(width: int) -> dict[str, int]:
    """Launch options of a program that has a row in its registers: 16 elements a thread, up to 32 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _parts_of_rows(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and launch options of programs that have a part of a row each."""
    block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": 4}


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _angles(x: Tensor) -> Tensor:
    """[R, C or 1, 1.., D/2] -> [R, C or 1, D/2], dense."""
    return x.reshape(*x.shape[:2], x.shape[-1]).contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm alone."""
    return AddNormFunction.apply(x, None, weight, eps)[1]


add_norm = AddNormFunction.apply
swiglu = SwiGLUFunction.apply
rotate = RotateFunction.apply
split_rotate = SplitRotateFunction.apply
add_rows = AddRowsFunction.apply
