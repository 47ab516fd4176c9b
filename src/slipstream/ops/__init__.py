"""Pure functions on tensors: returns, losses, distributions, running statistics. `[T, B]` in, `[T, B]` out."""
