"""Attention as operators of ONNX: which form is legal, and writing it."""
