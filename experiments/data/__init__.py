"""TFDS builders with their texts, and the Grain pipelines that read them."""
