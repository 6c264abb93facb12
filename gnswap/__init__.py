"""gnswap (the public list is put in place by the lead once all verbs have landed)."""

__version__ = "0.1.0"
