"""Triton kernels. setup.py maps the packages of the top-level kernels/ directory into this one."""
