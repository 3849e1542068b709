"""Reads the authors' checkpoints without TensorFlow."""
