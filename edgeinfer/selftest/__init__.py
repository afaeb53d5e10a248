"""Whether a device computes what it must, and how fast: models made in memory, no file, no Numba.

Results are judged by hashes of what the CPU computes, which come with the package.
"""
