"""Which experts a pattern of a config picks, found by trying it on every module's name.

Engines match patterns in different ways: compressed-tensors takes what follows
``re:`` for a regular expression, GPTQModel what follows ``+:`` or ``-:``, ModelOpt
and Quark take shell patterns. A pattern is tried in each way that fits its form.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from functools import cached_property

from placer.arrays import IntArray
from placer.model.tensor_layout import TensorLayout

_PREFIX = re.compile(r"re:|[-+]:")
_MARKS = re.compile(r"[\\*?()|^$+{\[]")
# A name that begins with the number of an expert; others name ``experts`` before it.
_BARE_NUMBER = re.compile(r"\d+\.\w+")
# What language models are below, in checkpoints and in engines.
ROOTS = ("", "model.", "model.language_model.", "language_model.model.", "language_model.")
LAYERS = re.compile(r"^.*?(?=layers\.\d)")
# How other families call the blocks of experts and their projections.
_OTHER_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "moe", "mixer", "ffn")
_OTHER_PARTS = (
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
    *("linear_fc1", "linear_fc2", "weight"),
)
_Match = Callable[[str], object]
_Groups = list[tuple[list[tuple[int, str]], IntArray]]


def is_pattern(text: str) -> bool:
    """Return whether a text is not a plain name."""
    return bool(_PREFIX.match(text) or _MARKS.search(text) or _BARE_NUMBER.fullmatch(text))


class ExpertModules:
    """The modules and tensors of routed experts, by layer and what they are in an expert.

    Parameters
    ----------
    layout
        The names of the family.
    names
        The tensors of the checkpoint.
    new_numbers
        By the model's own number of each MoE layer, ``[E]``: new number of each expert.
    """

    def __init__(
        self,
        layout: TensorLayout,
        names: Iterable[str],
        new_numbers: Mapping[int, IntArray],
    ) -> None:
        self._layout = layout
        self._names = names
        self._new_numbers = new_numbers
        self._outcomes: dict[tuple[str, int], tuple[bool, bool]] = {}

    def picks_others(self, text: str) -> bool:
        """Return whether a pattern would pick other experts once they are renumbered."""
        return any(self._outcome(text, way)[1] for way in range(len(_ways(text))))

    def picks(self, text: str) -> bool:
        """Return whether a pattern picks any expert."""
        return any(self._outcome(text, way)[0] for way in range(len(_ways(text))))

    def picks_alike_elsewhere(self, text: str) -> bool:
        """Return whether a pattern is for names of another family, and picks all alike."""
        outcomes = [self._tried(way, self._others) for way in _ways(text)]
        return any(picks for picks, _ in outcomes) and not any(odd for _, odd in outcomes)

    def _outcome(self, text: str, way: int) -> tuple[bool, bool]:
        if (text, way) not in self._outcomes:
            self._outcomes[text, way] = self._tried(_ways(text)[way], self._groups)
        return self._outcomes[text, way]

    @cached_property
    def _groups(self) -> _Groups:
        """Names of one part of all experts of a layer, with the numbers of the experts."""
        groups: dict[tuple[int, str], dict[int, str]] = {}
        for name in self._names:
            place = self._layout.classify(name)
            if place is None or place.expert is None or place.layer is None:
                continue
            if place.layer in self._new_numbers:
                start, _, rest = place.template.partition("{expert}")
                parts = rest.split(".")
                for end in range(1, len(parts) + 1):
                    part = start + "{expert}" + ".".join(parts[:end])
                    one = part.replace("{expert}", str(place.expert))
                    groups.setdefault((place.layer, part), {})[place.expert] = one
        return [
            (sorted(found.items()), self._new_numbers[layer])
            for (layer, _), found in groups.items()
        ]

    @cached_property
    def _others(self) -> _Groups:
        """The same of names that experts have in other families."""
        return [
            (
                [
                    (expert, f"model.layers.{layer}.{block}.experts.{expert}.{part}")
                    for expert in range(len(numbers))
                ],
                numbers,
            )
            for layer, numbers in self._new_numbers.items()
            for block in _OTHER_BLOCKS
            for part in _OTHER_PARTS
        ]

    def _tried(self, match: _Match, groups: _Groups) -> tuple[bool, bool]:
        """Return whether a pattern picks any expert, and whether it would pick others."""
        for root in (None, *ROOTS):
            picks = False
            for names, numbers in groups:
                picked = {
                    expert
                    for expert, name in names
                    if match(name if root is None else LAYERS.sub(root, name, count=1))
                }
                picks |= bool(picked)
                if picked != {int(numbers[expert]) for expert in picked}:
                    return True, True
            if picks:  # other roots are for patterns of another program's names
                return True, False
        return False, False


def _ways(text: str) -> list[_Match]:
    """Return the ways in which an engine may match a pattern; none if it cannot."""
    prefix = _PREFIX.match(text)
    body = text[prefix.end() :] if prefix else text
    ways: list[_Match] = []
    if not prefix:
        ways.append(re.compile(translate(body)).match)
        if _BARE_NUMBER.fullmatch(body):
            return [lambda name: f".{body}." in f".{name}."]
    try:
        expression = re.compile(body)
    except re.error:  # an engine refuses it, or takes it for a shell pattern
        return ways
    return [*ways, expression.match, expression.search]
