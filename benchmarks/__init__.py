"""Benchmarks of the runtime: against other systems (``make bench``) and simulated."""
