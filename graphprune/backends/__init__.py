"""Writes and reads what people run: Hugging Face checkpoints, ONNX models, archives."""
