"""FlashInfer's compiled modules: which a model needs, where they are, and how they are compiled."""
