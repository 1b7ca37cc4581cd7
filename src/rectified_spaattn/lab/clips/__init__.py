"""One generation with any supported diffusers model: load, run, compare, record."""
