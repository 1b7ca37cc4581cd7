"""How fast it is, checked before it is timed: the operator, whole transformers, and what can run on a machine."""
