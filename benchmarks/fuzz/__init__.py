"""Random gradients, layouts, strides and options through every library, against exact sums."""
