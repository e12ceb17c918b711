"""Encoder-decoders as an encoder and a decoder with caches, cut out of the graph of one call."""
