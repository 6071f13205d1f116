"""``python -m gcx bench``: how fast the gradients of whole models are centralized."""
