"""What a program is written as: a Hugging Face directory, an ONNX model, an archive of its own."""
