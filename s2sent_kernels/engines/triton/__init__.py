"""The Triton engine: one stage a file, each with its kernels and their launchers.

``limits`` needs torch alone; ``engine`` imports Triton, and is imported when the backend is first used.
"""
