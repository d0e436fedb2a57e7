"""The stages of a run: each says only what is its own."""
