"""Speed beside peers: ``make bench`` or ``python -m bench``."""
