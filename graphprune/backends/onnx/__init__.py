"""A program as an ONNX model or package."""
