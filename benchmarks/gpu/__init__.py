"""All that gcx promises on GPUs, measured."""
