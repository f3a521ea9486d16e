"""Device code. Imports triton only.

Read in this order: activations, cells, tiles, sync, product, forward, backward; then norm, zoneout.
"""
