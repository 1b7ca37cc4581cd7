"""The GPU kernels in Triton, one stage a file: tile (and pool) -> plan -> attend. Backends put them together."""
