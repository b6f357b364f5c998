"""Servers and workers of other processes and machines: the pool, what is exchanged, who ends whom. No torch."""
