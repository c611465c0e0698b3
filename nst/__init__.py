"""Artistic style transfer with conditional adversarial networks (arXiv 2302.03875), in plain PyTorch."""
