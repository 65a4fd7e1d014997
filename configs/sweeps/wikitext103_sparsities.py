"""Transformer-XL on WikiText-103: dense, pruned, and Top-KAST by forward and backward sparsity.

Jayakumar et al., 2020, arXiv:2106.03517, section 4.2.

    python -m experiments.sweep --sweep=configs/sweeps/wikitext103_sparsities.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/wikitext103_sparsities.py --table \\
        --metric=perplexity
"""

from typing import Any

from configs.sweeps.language import sparsities


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return sparsities("configs/wikitext103_transformer_xl.py", ("standard", "large"))
