"""Runs PTX, the assembly language of NVIDIA's GPUs, on the CPU.

parse.py reads the text; translate.py and instructions.py make C++ of it, with the operations of operations.h; build.py
compiles that and keeps it; kernel.py launches it on machine.cpp, whose threads stop where they meet, and whose memory
knows who may access what.
"""
