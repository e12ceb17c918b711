"""Trains a program: objective, samples, loop, LoRA; or its branches one by one."""
