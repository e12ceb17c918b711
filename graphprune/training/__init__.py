"""Trains a program: objective, samples, loop, LoRA."""
