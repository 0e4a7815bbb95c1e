"""Libraries of the benchmarks. The scripts beside this folder import them, and never each other."""
