"""What a mode does with what a bundle has: walk the trie, scan packed codes, look for words."""

from __future__ import annotations

from typing import NamedTuple

from service.search.options import MODES, Mode, SearchOptions

NO_CODES = "no packed codes: index with a model that has an adapter (recipe qama)"
NO_WORDS = "no index of words: index again without --no-lexical"
NO_WEIGHT = "words that count nothing: give a lexical_weight above 0"


class Has(NamedTuple):
    """What a bundle has beside its trie: packed codes, an index of words, and its model's weight of words."""

    codes: bool
    words: bool
    lexical_weight: float


class Ways(NamedTuple):
    """What a search does: walk the trie, scan packed codes, look for words."""

    walk: bool
    scan: bool
    words: bool


def ways_of(options: SearchOptions, has: Has) -> Ways:
    """Return what a mode does with a bundle; raises ValueError for a mode that the bundle cannot serve."""
    mode, joins = options.mode, options.mode == "hybrid"
    if mode == "hamming" and not has.codes:
        raise ValueError(f"this bundle has {NO_CODES}")
    if mode == "lexical" and not has.words:
        raise ValueError(f"this bundle has {NO_WORDS}")
    scan = mode == "hamming" or (joins and has.codes)
    words = mode == "lexical" or (joins and has.words and weight_of_words(options, has) > 0)
    if joins and not (scan or words):
        raise ValueError(
            f"this bundle has nothing to join the walk with: {NO_CODES}, and {NO_WEIGHT if has.words else NO_WORDS}"
        )
    return Ways(mode in ("generative", "hybrid"), scan, words)


def weight_of_words(options: SearchOptions, has: Has) -> float:
    """The weight of words in the mode `hybrid`: what is asked for, or the model's; none with ranking `cosine`."""
    if options.ranking == "cosine":
        return 0.0
    return has.lexical_weight if options.lexical_weight is None else options.lexical_weight


def served(has: Has) -> list[Mode]:
    """The modes that a bundle can serve."""
    return [mode for mode in MODES if _is_served(mode, has)]


def _is_served(mode: Mode, has: Has) -> bool:
    try:
        ways_of(SearchOptions(mode=mode), has)
    except ValueError:
        return False
    return True
