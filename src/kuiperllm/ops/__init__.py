"""Operators: what is computed, checked against a declared contract, and the kernels for each back end.

An operator is a package `ops/<op>`: its `__init__` holds contract, public function, a plain NumPy
`reference` and `CASES`; `cpu.py` launches the kernels in `cpu_kernel.py`. A back end joins by adding a
module of its name to each package.
"""
