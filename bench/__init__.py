"""Measurements that need a quiet machine: run from a checkout."""
