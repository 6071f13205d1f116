"""Where the fan-in is in the layers of JAX: one file for each framework."""
