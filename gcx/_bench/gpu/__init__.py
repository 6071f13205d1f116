"""``python -m gcx bench gpu --check``: whatever gcx promises of GPUs, measured."""
