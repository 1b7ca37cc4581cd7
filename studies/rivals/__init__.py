"""Rules of other publications as plain PyTorch, on attention calls of any supported pipeline, at equal executed pairs.

Each file follows what a paper says of its method, not its code; `python -m studies.rivals --help`.
"""
