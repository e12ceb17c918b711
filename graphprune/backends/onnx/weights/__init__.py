"""The weights that an ONNX model holds: turned the way they are used, quantized, and read back."""
