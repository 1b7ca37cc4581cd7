"""Measuring what sparsity does: to whole videos (paired generation) and to one attention call."""
