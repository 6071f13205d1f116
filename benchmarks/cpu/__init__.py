"""Speed, cost and accuracy on one core of a CPU."""
