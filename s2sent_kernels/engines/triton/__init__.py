"""The Triton engine: one stage a file. ``limits`` can be asked without Triton; ``engine`` imports it."""
