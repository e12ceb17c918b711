"""Smaller vocabularies: the rows of a program and the tokenizer beside it, together."""
