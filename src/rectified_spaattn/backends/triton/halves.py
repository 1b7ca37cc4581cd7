"""float32 as the sum of two bfloat16, right to 16 bits, for tensor cores; any dtype works."""

import triton
import triton.language as tl


@triton.jit
def dot_halves(a, a_low, b, b_low, acc):
    """acc + (a + a_low) @ (b + b_low), without the product of the two low halves, which is below float32's rounding."""
    acc = tl.dot(a_low, b, acc, input_precision="ieee")
    acc = tl.dot(a, b_low, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def halves(x, DTYPE: tl.constexpr):
    """Of float32 x, in DTYPE."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def store_halves(to_ptr, half, x, mask):
    """The low half `half` elements behind the high one."""
    high, low = halves(x, to_ptr.dtype.element_ty)
    tl.store(to_ptr, high, mask=mask)
    tl.store(to_ptr + half, low, mask=mask)
