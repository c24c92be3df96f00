"""Softmax attention: forward, backward, and the pure functions that choose their launch."""
