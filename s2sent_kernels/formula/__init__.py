"""What is computed, in plain PyTorch. Change a formula here and every backend is wrong until it follows."""
