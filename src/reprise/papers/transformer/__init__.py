"""Attention Is All You Need (Vaswani et al., NIPS 2017): an encoder-decoder made of attention alone."""
