"""Text in and out: corpora, tokenizers, batches, preferences, and the world of fables."""
