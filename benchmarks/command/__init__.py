"""The tools that the commands of `benchmarks` share."""
