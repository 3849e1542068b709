"""The authors' checkpoints, read without TensorFlow."""
