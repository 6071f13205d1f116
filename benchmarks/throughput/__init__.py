"""How fast gcx centralizes the gradients of whole models."""
