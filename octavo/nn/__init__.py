"""Modules to write models with: attention, residual wirings, rotary embedding, norms, MLPs."""
