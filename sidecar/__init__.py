"""A proxy for language-model providers: pools, rate windows, cooldowns and honest streams.

It never imports the reconciler; HTTP and the database file are their only contacts.
"""

__version__ = "0.1.0"
