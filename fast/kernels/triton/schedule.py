"""The learning rate of the next iteration, out of a table of all, where the number of iterations is known to the device alone.

One launch, for latency: 12 bytes read and 12 written.

Versions (not measured: no GPU was at hand)
  1. initial · max(1 - done / iterations, 0)^0.9 and the counting by the library: seven launches
  2. this: one launch of one warp, 23 instructions
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["last"])
def schedule_kernel(
    rates_ptr,  # (last + 1,), float32
    done_ptr,  # (), int64: iterations so far
    rate_ptr,  # (), float32
    last,
):
    """Write the rate after `done` iterations, the last one if there are no more, and count one more."""
    done = tl.load(done_ptr)
    tl.store(rate_ptr, tl.load(rates_ptr + tl.minimum(done, last)))
    tl.store(done_ptr, done + 1)
