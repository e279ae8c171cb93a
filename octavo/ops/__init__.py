"""The public functions: argument checks, dispatch to a kernel, accounting."""
