"""Benchmarks: each compares side by side in one run, and is an experiment like any other."""
