"""Counter-based randomness: a row's noise depends only on its seed and counters.

Each number is a hash of (seed, decision, stream, column), so it is the same in any batch, after
preemption, and on every device. The hash is splitmix64's finaliser
(Steele et al., 2014, "Fast splittable pseudorandom number generators").
"""

import torch
from torch import Tensor

SAMPLE_STREAM = 1
GUMBEL_STREAM = 2
GAMMA_STREAM = 3
ADAPTER_STREAM = 4
VECTOR_STREAM = 5
HALT_STREAM = 6
DRAW_STREAM = 7

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_GAMMA_TRIES = 8  # each try is rejected with p < 0.05, so all eight with p < 4e-11


def _wrap(x: int) -> int:
    """Wrap to a signed 64-bit integer, as arithmetic on the device does."""
    return (x + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed: Tensor, counter: Tensor, stream: int, columns: Tensor) -> Tensor:
    """Draw numbers in (0, 1).

    Args:
        seed: [num_rows] int64.
        counter: [num_rows] int64, the row's decision number.
        stream: Separates the uses of randomness within a decision.
        columns: [num_rows or 1, width] int64, what each number is for, such as a token id. Not the
            token's rank: rounding may swap the ranks of two tokens, and must not swap their noise.

    Returns:
        [num_rows, width] float32, multiples of 2**-23 moved off 0 and 1.
    """
    key = _finalise(seed + _GOLDEN * (counter + 1))  # [num_rows]
    key = _finalise(key + _wrap(_GOLDEN * stream))
    bits = _finalise(key.unsqueeze(1) + _GOLDEN * (columns + 1))
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(u: Tensor) -> Tensor:
    """Turn uniform numbers into standard Gumbel noise of the same shape."""
    return -torch.log(-torch.log(u))


def normal(seed: Tensor, counter: Tensor, stream: int, columns: Tensor) -> Tensor:
    """Draw standard normal numbers (Box and Muller, 1958); arguments and shape as in `uniform`."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(seed, counter, stream, 2 * columns)))
    return radius * torch.cos(2 * torch.pi * uniform(seed, counter, stream, 2 * columns + 1))


def log_gamma_draw(shape: Tensor, seed: Tensor, counter: Tensor, columns: Tensor) -> Tensor:
    """Draw the logarithm of Gamma(shape, 1) variates (Marsaglia and Tsang, 2000).

    Works in logs because small shapes underflow; shapes below 1 use Gamma(a) = Gamma(a+1) U^(1/a).

    Args:
        shape: [num_rows, width] float32, positive.
        seed: [num_rows] int64.
        counter: [num_rows] int64.
        columns: [num_rows, width] int64, as in `uniform`.

    Returns:
        [num_rows, width] float32.
    """
    num_rows, width = shape.shape
    num_each = 3 * _GAMMA_TRIES + 1
    each = columns.unsqueeze(-1) * num_each + torch.arange(num_each, device=columns.device)
    u = uniform(seed, counter, GAMMA_STREAM, each.view(num_rows, -1))
    u = u.view(num_rows, width, num_each)
    tries = u[..., :-1].view(num_rows, width, _GAMMA_TRIES, 3)  # [num_rows, width, tries, 3]
    normal = torch.sqrt(-2.0 * torch.log(tries[..., 0])) * torch.cos(2 * torch.pi * tries[..., 1])
    is_small = shape < 1.0
    d = (torch.where(is_small, shape + 1.0, shape) - 1.0 / 3.0).unsqueeze(-1)
    v = (1.0 + normal / torch.sqrt(9.0 * d)) ** 3  # [num_rows, width, tries]
    log_v = torch.log(v.clamp_min(1e-30))
    is_accepted = (v > 0) & (torch.log(tries[..., 2]) < 0.5 * normal**2 + d - d * v + d * log_v)
    first = is_accepted.to(torch.int8).argmax(-1, keepdim=True)  # first accepted try
    drawn = (torch.log(d) + log_v).gather(-1, first).squeeze(-1)
    boost = torch.log(u[..., -1]) / shape.clamp_min(1e-30)
    return torch.where(is_small, drawn + boost, drawn)
