"""The GPU kernels in Triton, one stage a file: (arrange ->) tile and pool -> plan -> attend. Backends join them."""
