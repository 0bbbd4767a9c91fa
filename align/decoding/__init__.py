"""What ``align.generate`` compares: the search in numpy, how close each step was, transformers' own."""
