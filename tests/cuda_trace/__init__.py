"""Traces of the CUDA path on fake tensors: every operator that a GPU would run, without a GPU.

guard.cpp     a CUDA device that computes nothing, for a build of PyTorch without CUDA
guard.py      builds and loads it
record.py     fake tensors on it; what is recorded of an operator, and the kernels it becomes
cases.py      what is traced: training steps, scores, decoding, graphs that are compiled
__main__.py   the command: `python -m tests.cuda_trace --help`
"""
