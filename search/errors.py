"""What goes wrong because of what a user gave. Parts raise it about fields and files; commands print it in one line."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the file or flag and the remedy."""
