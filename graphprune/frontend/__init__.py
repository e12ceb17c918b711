"""Turns an `nn.Module` into a program in canonical form."""
