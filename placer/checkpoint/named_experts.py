"""Lists that name single experts, whose numbers an export changes.

Quantisers write down which layers they left as they were: ``ignore`` of
compressed-tensors, ``modules_to_not_convert`` of AWQ, GPTQ and FP8, ``dynamic`` of
GPTQModel, ``exclude_modules`` of ModelOpt. There names are renumbered in the text of the
file, all other bytes of which stay; what is no plain name is refused, not guessed.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.model.tensor_layout import TensorLayout
from placer.run.documents import read_json
from placer.run.files import read_text

#: Files in which quantisers keep such lists.
CONFIG_NAMES = (
    "config.json",
    "hf_quant_config.json",
    "quant_config.json",
    "quantize_config.json",
)
# A number behind ``experts.``, also where the dot is escaped or the number in brackets.
_NAMED = re.compile(r"\bexperts?\\*\.[(\[]*\d")
# GPTQModel marks names by +: and -:; a pattern may end in .*, which no number is part of.
_PLAIN = re.compile(r"(?P<before>(?:[-+]:)?)(?P<name>[\w.]+?)(?P<after>(?:\.\*)?)")
# A name without the number of a layer.
_IN_ANY_LAYER = re.compile(
    r"(?P<before>(?:[A-Za-z_]+\.)*experts\.)(?P<number>\d+)(?P<after>(?:\.\w+)*)"
)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def renumbered_configs(
    directory: Path, layout: TensorLayout, new_numbers: Mapping[int, IntArray]
) -> dict[str, bytes]:
    """Return the configs of a checkpoint that name single experts, renumbered.

    Parameters
    ----------
    directory
        The checkpoint.
    layout
        The names of its family.
    new_numbers
        By the model's own number of each MoE layer, ``[E]``: new number of each expert.

    Raises
    ------
    PlacerError
        If a text picks single experts otherwise than by their plain name.
    """
    found = {}
    for name in CONFIG_NAMES:
        path = directory / name
        if not path.is_file():
            continue
        named = [one for one in _texts(read_json(path, "config")) if _NAMED.search(one)]
        all_or_none = _all_or_none(named, new_numbers)
        replaced = {
            one: _renumbered(one, path, layout, new_numbers)
            for one in named
            if one not in all_or_none
        }
        text = read_text(path)
        renumbered = _replaced(text, replaced, path)
        if renumbered != text:
            found[name] = renumbered.encode()
    return found


def require_no_named_expert(value: Any, source: Path) -> None:
    """Refuse texts that name single experts and cannot be renumbered.

    Parameters
    ----------
    value
        A JSON value, such as the metadata of a shard.
    source
        The file it stands in, for the error.

    Raises
    ------
    PlacerError
        If any text in it, keys included, holds ``experts.`` and a number.
    """
    for text in _texts(value):
        if _NAMED.search(text):
            raise _refused(text, source)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in (*value, *value.values()):
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _renumbered(
    text: str, source: Path, layout: TensorLayout, new_numbers: Mapping[int, IntArray]
) -> str:
    plain = _PLAIN.fullmatch(text)
    if plain is None:
        raise _refused(text, source)
    # Some lists leave out the name of the model, and all that of the parameter.
    for prefix in ("", "model."):
        place = layout.classify(f"{prefix}{plain['name']}.weight")
        if place is None:
            continue
        if place.layer is None:
            return text
        if place.expert is None or place.layer not in new_numbers:
            break
        numbers = new_numbers[place.layer]
        if place.expert >= len(numbers):
            break
        name = place.template.replace("{expert}", str(numbers[place.expert]))
        name = name.removeprefix(prefix).removesuffix(".weight")
        return f"{plain['before']}{name}{plain['after']}"
    raise _refused(text, source)


def _all_or_none(
    texts: Iterable[str], new_numbers: Mapping[int, IntArray]
) -> frozenset[str]:
    """Return the texts that name every expert of every layer alike.

    GPTQ lists what it quantised in any layer (``modules_in_block_to_quantize``), for
    example ``block_sparse_moe.experts.0.w1`` and the same of each other expert.
    """
    experts: dict[str, dict[str, str]] = defaultdict(dict)
    for text in texts:
        if found := _IN_ANY_LAYER.fullmatch(text):
            experts[found["before"] + "{}" + found["after"]][found["number"]] = text
    most = max(len(numbers) for numbers in new_numbers.values())
    wanted = {str(number) for number in range(most)}
    return frozenset(
        text
        for named in experts.values()
        if named.keys() == wanted
        for text in named.values()
    )


def _replaced(text: str, replaced: Mapping[str, str], source: Path) -> str:
    """Replace JSON strings all at once: 3 becomes 5 where 5 becomes 3."""

    def replacement(match: re.Match[str]) -> str:
        value = json.loads(match[0], strict=False)
        if value not in replaced:
            return match[0]
        if json.dumps(value) != match[0]:  # spelled with escapes that would be lost
            raise _refused(match[0], source)
        return json.dumps(replaced[value])

    return _JSON_STRING.sub(replacement, text)


def _refused(text: str, source: Path) -> PlacerError:
    return PlacerError(
        f"{source} names single experts: {text}",
        "remove it if it does not matter; or, for an engine that reads a map of this "
        "model: placer export sglang PLAN MODEL --out map.json",
    )
