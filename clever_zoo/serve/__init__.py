"""Serving: the HTTP service and the Triton model repository."""

MAX_IMAGE_PIXELS = 25_000_000  # by default; cameras and phones of 24 megapixels
