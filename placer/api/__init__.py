"""The Python API: traces, counts and plans as objects, and what the commands do with them.

Its names are those of ``placer`` itself (``placer.__all__``); ``docs/api.md`` lists them.
Parameters have the names of the commands' options. Paths may be ``str`` or ``Path``. Errors
are those of :mod:`placer.errors`; a warning of a command is a :class:`PlacerWarning`.
"""
