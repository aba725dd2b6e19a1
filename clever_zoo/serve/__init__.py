"""Serving: the HTTP service and the Triton model repository."""
