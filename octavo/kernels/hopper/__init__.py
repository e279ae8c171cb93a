"""Kernels for sm_90 written in Gluon: wgmma, TMA, warp specialisation."""
