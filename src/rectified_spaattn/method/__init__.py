"""The method in plain PyTorch: pool -> estimate -> select -> gain -> rectify, and reference.py, the oracle."""
