"""The paper's tables on data at hand; see ``python -m benchmarks paper --help``."""
