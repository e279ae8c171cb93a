"""Portable GPU kernels (sm_80 and up); they run in Triton's interpreter too."""
