"""From text to token windows: tokenizers, corpora, the indexed dataset, its order, the loader."""
