"""Hooks into other frameworks."""
