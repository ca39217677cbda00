"""A fuzzer of everything that reads strangers' bytes: tars, records, pictures and verification files.

python -m tests.fuzz --cases 100000 --seed 0 [--json FILE]
"""
