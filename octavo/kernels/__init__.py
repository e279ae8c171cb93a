"""Kernels, one package a backend, each exposing the same plain functions; only `octavo.ops` imports them."""
