"""The oracle: plain torch, fp32 and fp64, obviously right."""
