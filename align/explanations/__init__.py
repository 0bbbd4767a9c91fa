"""What ``align.diagnose`` has in stock: relations between two weights, and variants of the reference's operations.

``weights.py`` says how a tensor differs from the one it should be. ``operations.py`` is the catalogue of what a net
may compute instead; ``surgery.py`` holds the tools that make torch compute it, ``place.py`` the part of the model
that is run. Nothing here looks at the candidate.
"""
