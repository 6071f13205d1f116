"""Programs around gcx: demo, agreement, speed, and the paper's study; ``python -m benchmarks``."""
