"""Scalar functions that Triton lacks or that its interpreter cannot run."""

import triton
import triton.language as tl

# The interpreter holds bfloat16 as integers and cuts a float32 off where it should round.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to a few roundings also for tiny x: the error of 1 + x cancels in the quotient."""
    u = 1.0 + x
    beyond = (u == 1.0) | (u == float("inf"))
    return tl.where(beyond, tl.where(u == 1.0, x, u), tl.log(u) * (x / tl.where(beyond, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0, right to a few roundings also for tiny x, by the same cancellation."""
    u = tl.exp(x)
    inner = (u != 1.0) & (u > 0.0)
    exact = (u - 1.0) * (x / tl.log(tl.where(inner, u, 0.5)))
    # u is 1 where x is lost beside it, 0 where e^x is; NaN comes from u itself
    return tl.where(inner, exact, tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def rounded(x, narrow: tl.constexpr):
    """x in the type it is stored in, rounded once, to nearest even."""
    if INTERPRETED and narrow == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        result = tl.where(x == x, even, bits) >> 16
        return result.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(narrow)
