"""Writing checkpoints: layouts of each format, tensors converted in pieces, files that appear whole."""
