"""Device code. Imports triton only.

Read in this order: activations, cells, sync, product, tiles, forward, backward; then norm, zoneout.
"""
