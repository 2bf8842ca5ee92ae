"""What the Tab key completes: values of options and arguments that are known names."""

from collections.abc import Callable

Completion = Callable[[str], list[str]]


def among(*known: str) -> Completion:
    """Return a function that completes one of these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def names(*of: str) -> Completion:
    """Return a function that completes the names that :func:`placer.names` returns.

    They are read when the shell asks for them, so that help stays instant.
    """

    def complete(incomplete: str) -> list[str]:
        import placer

        return among(*(name for one in of for name in placer.names(one)))(incomplete)

    return complete
