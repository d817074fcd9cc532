"""Runs PTX, the assembly language of NVIDIA's GPUs, on the CPU: what Triton and nvcc have compiled, on CPU tensors.

parse.py reads the text, translate.py and instructions.py make C++ of it, machine.h and machine.cpp are what that runs
on: threads that stop where they meet, memory whose every access is checked. build.py compiles and keeps the results.
kernel.py launches. emulation.py puts it under a backend: triton_emulation.py and cuda_emulation.py.
"""
