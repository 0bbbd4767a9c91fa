"""What ``align.data`` compares: tokenizers, loaders and image processors, and known mistakes of them."""
