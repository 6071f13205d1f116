"""``python -m benchmarks bench``: how fast the gradients of whole models are centralized."""
