"""The harness: `python -m lstm_triton.perf <command>`; docs/measuring.md says what its numbers mean.

sweep       sweep, cases, presets; providers, peers, cudnn; judge, numerics; timing, memory, floor
gpu-check   gpu_check, parts, processes, closing; engines, problems, kinks, interpreting: numerics of every variant
probe       probe, probe_constants, probe_launches, probe_kernels
tune        tune, trial
resources   resources, variants, baseline; budget, sass, ptx, flow: one step in machine code
compare     compare, frames
report      report, figures, style, page, frames
all         options, table, environment, precompile

Every speed belongs to a result whose numerics were checked first, in the same process and on the same shapes.
"""
