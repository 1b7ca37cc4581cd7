"""The method in plain PyTorch: (arrange ->) pool -> estimate -> select -> gain -> rectify; reference.py, the oracle."""
