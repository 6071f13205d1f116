"""``python -m benchmarks bench gpu --check``: whatever gcx promises of GPUs, measured."""
