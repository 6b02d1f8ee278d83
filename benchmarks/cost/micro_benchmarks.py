"""Ways to compute the parts of a step that were weighed against each other, in milliseconds.

    python -m benchmarks.cost.micro_benchmarks [--threads 2]

Medians over interleaved rounds, on a 96-channel 3×3 layer on 32×32 images, batch 128; on one of 8 channels,
batch 256; on a `Linear` layer of 4096 × 4096.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from benchmarks.timing import in_turn, show_conditions
from kfqn.formulas.inputs import Inputs
from kfqn.formulas.orthogonal import orthogonalised
from kfqn.formulas.secant import bfgs_update_
from kfqn.formulas.statistics import mean_activation, mean_preactivation, second_moment_matvec
from kfqn.parameters.discovery import layers_of

ROUNDS = 9


def eq_13_by_convolution(a: Tensor, v: Tensor) -> Tensor:
    """A v as a convolution with v as one filter, and that convolution's weight gradient."""
    filters = v[:-1].view(1, a.shape[1], 3, 3)
    u = F.conv2d(a, filters, v[-1:], padding=1)
    Av = conv2d_weight(a, list(filters.shape), u, padding=1)
    return torch.cat((Av.flatten(), u.sum()[None])) / len(a)


def eq_13_for_all_data(inputs: Inputs, a: Tensor, v: Tensor) -> Tensor:
    """A v with every map of the batch written out before any is read."""
    return inputs.weighted_sum(a, inputs.inner(a, v)) / len(a)


def product_with_copies(inputs: Inputs, V: Tensor, H: Tensor) -> Tensor:
    """V H for blocks of H, by cutting V into one batch of pieces and putting the products together again."""
    assert inputs.blocks is not None
    pieces = V[:, :-1].unflatten(1, (inputs.blocks.count, -1))
    ones = torch.zeros(1, inputs.blocks.count, 1)
    ones[:, -1] = 1
    products = torch.cat((pieces, V[:, None, -1:] * ones), dim=-1).movedim(1, 0) @ H
    joined = products[..., :-1].movedim(0, 1).flatten(1)
    return torch.cat((joined, products[-1, :, -1:]), dim=1)


def product_by_block(inputs: Inputs, V: Tensor, H: Tensor) -> Tensor:
    """V H for blocks of H, each product copied to its place."""
    assert inputs.blocks is not None
    P, width = torch.empty_like(V), inputs.blocks.size
    for n, H_n in enumerate(H):
        last = n == len(H) - 1
        columns = slice(n * width, (n + 1) * width + last)
        P[:, columns] = V[:, columns] @ H_n[: width + last, : width + last]
    return P


def orthogonalised_in_bfloat16(P: Tensor) -> Tensor:
    """All products of matrices in half the bytes, as Muon's are."""
    (found,) = orthogonalised([P.bfloat16()], 256)
    return found.float()


def rounded_inside(way: Callable[[], object]) -> None:
    """``way``, where torch may round what goes into a product of matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    way()
    torch.set_float32_matmul_precision(before)


def averaged_as_a_matrix(average: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """D̂W from DW written out beside it."""
    return average.lerp_(torch.cat((weight, bias[:, None]), dim=1), 0.1)


def rank_two_by_outer_products(H: Tensor, s: Tensor, y: Tensor) -> None:
    """Eq. (9) with its matrices written out in place, two rank-one updates."""
    sy, Hy = s @ y, H @ y
    u = ((1 + (y @ Hy) / sy) / 2 * s - Hy) / sy
    H.addr_(s, u).addr_(u, s)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    show_conditions(threads=options.threads)

    module = nn.Conv2d(96, 96, 3, padding=1)
    (layer,) = layers_of(module)
    a, v = torch.randn(128, 96, 32, 32), torch.randn(layer.columns)
    h = module(a)
    torch.testing.assert_close(
        eq_13_by_convolution(a, v), second_moment_matvec(layer.inputs, a, v), rtol=1e-3, atol=0.1
    )
    s, H = torch.randn(1729), torch.eye(1729)
    (narrow,), b, w = layers_of(nn.Conv2d(8, 8, 3, padding=1)), torch.randn(256, 8, 32, 32), torch.randn(73)
    torch.testing.assert_close(
        eq_13_for_all_data(narrow.inputs, b, w),
        second_moment_matvec(narrow.inputs, b, w),
        rtol=1e-3,
        atol=0.1,
    )
    (wide,) = layers_of(nn.Linear(4096, 4096))
    blocks, V, H_A = wide.inputs.in_blocks(257), torch.randn(4096, 4097), torch.randn(16, 257, 257)
    for product in (product_with_copies, product_by_block):
        torch.testing.assert_close(product(blocks, V, H_A), blocks.times(V, H_A), rtol=1e-3, atol=0.1)
    P = V[:, :-1].contiguous()
    torch.testing.assert_close(
        orthogonalised_in_bfloat16(P), *orthogonalised([P], 256), rtol=0, atol=0.1 * P.std().item()
    )
    for p in wide.parameters():
        p.grad = torch.randn_like(p)
    DW, (dw, db) = wide.DW(wide.gradients()), wide.gradients()
    ways: dict[str, Callable[[], object]] = {
        "the layer's own forward pass": lambda: module(a),
        "eq. (13) as a convolution and its weight gradient": lambda: eq_13_by_convolution(a, v),
        "eq. (13) channels first (kept)": lambda: second_moment_matvec(layer.inputs, a, v),
        "eq. (13), 8 channels, all data at once": lambda: eq_13_for_all_data(narrow.inputs, b, w),
        "eq. (13), 8 channels, in cache (kept)": lambda: second_moment_matvec(narrow.inputs, b, w),
        "D̂W H_A in 16 blocks, cut and joined": lambda: product_with_copies(blocks, V, H_A),
        "D̂W H_A in 16 blocks, copied to their places": lambda: product_by_block(blocks, V, H_A),
        "D̂W H_A in 16 blocks, written in place (kept)": lambda: blocks.times(V, H_A),
        "D̂W H_A in 16 blocks, float32 products rounded": lambda: rounded_inside(lambda: blocks.times(V, H_A)),
        "4096 × 4096 orthogonalised (kept)": lambda: orthogonalised([P], 256),
        "4096 × 4096 orthogonalised, rounded": lambda: rounded_inside(lambda: orthogonalised([P], 256)),
        "4096 × 4096 orthogonalised in bfloat16": lambda: orthogonalised_in_bfloat16(P),
        "D̂W averaged from DW as a matrix": lambda: averaged_as_a_matrix(V, dw, db),
        "D̂W averaged part by part (kept)": lambda: wide.average_DW(V, wide.gradients(), 0.9, 0.0),
        "whether DW is finite, by its largest entry": lambda: torch.linalg.vector_norm(DW, math.inf),
        "whether DW is finite, by its 2-norm (kept)": lambda: torch.linalg.vector_norm(DW),
        "mean activation (kept: mean over data first)": lambda: mean_activation(layer.inputs, a),
        "mean of h by h.mean": lambda: h.mean((0, 2, 3)),
        "mean of h by a product (kept)": lambda: mean_preactivation(layer.preactivation(h)),
        "BFGS, side 1729, two addr_": lambda: rank_two_by_outer_products(H, s, s),
        "BFGS, side 1729, one addmm_ (kept)": lambda: bfgs_update_([H], s[None], s[None]),
    }
    for name, measured in in_turn(ways, ROUNDS).items():
        median = statistics.median(seconds for seconds, _ in measured)
        print(f"  {name:<52}{1e3 * median:8.2f} ms")


if __name__ == "__main__":
    main()
