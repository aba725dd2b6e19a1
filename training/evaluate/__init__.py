"""Evaluations of frozen encoders; `python -m training.evaluate RUN` writes one results record."""
