"""The harness: `python -m lstm_triton.perf sweep | gpu-check | resources`.

Every speed it prints belongs to a result whose numerics were checked first, in the same process and on the same shapes.
"""
