"""The oracle: every op in plain torch, fp32 or fp64, differentiable, obviously right and never fast."""
