"""Words of a text, and their ids by frequency, as in the code of Transformer-XL."""

import collections
from collections.abc import Iterable, Sequence

EOS = "<eos>"  # ends a line; id 0; no word of a text


def words_of(line: str) -> list[str]:
    """The words of a line, and `<eos>`; an empty line is `<eos>` alone."""
    return [*line.split(), EOS]


def count(lines: Iterable[str]) -> collections.Counter[str]:
    """How often each word comes in a text, in order of appearance."""
    counter: collections.Counter[str] = collections.Counter()
    for line in lines:
        counter.update(words_of(line))
    return counter


def by_frequency(counters: Sequence[collections.Counter[str]]) -> list[str]:
    """`<eos>`, then all words, the most frequent first.

    Of equally frequent words, the one that comes first in the text is first.
    """
    total: collections.Counter[str] = collections.Counter()
    for counter in counters:
        total.update(counter)
    del total[EOS]
    return [EOS, *(word for word, _ in total.most_common())]
