"""Every backend against an exact reference, and against the others."""
