"""Files that name experts by number: an export changes the numbers.

Quantisers write down which layers they left as they were, or how each is stored: ``ignore``
of compressed-tensors, ``modules_to_not_convert`` of AWQ, GPTQ and FP8, ``dynamic`` of
GPTQModel, ``exclude_modules`` of ModelOpt, ``extra_config`` of AutoRound, whole files of
EXL3 and ModelSlim. Any JSON file next to the tensors may hold such a list, and so may the
metadata of a shard. There names are renumbered in the text, all other bytes of which stay.
A pattern stays where it picks the same experts as before, and is refused elsewhere.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from placer.arrays import IntArray
from placer.checkpoint.expert_patterns import LAYERS, ROOTS, ExpertModules, is_pattern
from placer.checkpoint.shard import replace_texts
from placer.errors import PlacerError
from placer.model.tensor_layout import TensorLayout
from placer.run.documents import parse_json, require_bounds
from placer.run.files import read_text

# JSON files of tokenizers and processors, which know of no module.
_OF_TOKENIZERS = (
    *("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "tekken"),
    *("generation_config", "preprocessor", "processor", "chat_template", "placer.json"),
)
# A number after ``experts``, with any marks between them.
_NAMED = re.compile(r"\bexperts?[^A-Za-z0-9]{1,8}\d")
# GPTQModel marks names by +: and -:; a pattern may end in .*, which no number is part of.
_PLAIN = re.compile(r"(?P<before>(?:[-+]:)?)(?P<name>[\w.]+?)(?P<after>(?:\.\*)?)")
# What may be a name or a pattern in a text of any kind.
_WORDS = re.compile(r"""[^\s"',;]*experts?[^\s"',;]*""")
# A name without the number of a layer.
_IN_ANY_LAYER = re.compile(
    r"(?P<before>(?:[A-Za-z_]+\.)*experts\.)(?P<number>\d+)(?P<after>(?:\.\w+)*)"
)
# Keys that say how many, how large or how often, though they name experts.
_MEASURES = {
    *("num", "n", "count", "counts", "size", "sizes", "width", "dim", "per", "capacity"),
    *("period", "offset", "interval", "freq", "step", "topk"),
}
# Numbers in a text, several.
_LISTED = re.compile(r"\s*\d+(?:[\s,;]+\d+)+\s*")
# Keys of numbers of layers.
_OF_LAYERS = ("_layers", "layer_ids", "layer_idx", "layer_indices")
# Texts that people and tools read, not engines: recipes and logs of quantisers.
_NOTES = (".yaml", ".yml", ".csv", ".txt", ".toml", ".jsonl", ".log", ".orig", ".bak")
_MOST_NOTED = 1 << 24


def description_files(files: Iterable[Path]) -> list[Path]:
    """Return the files of a checkpoint that may name experts."""
    return [
        path
        for path in files
        if path.suffix == ".json" and not path.name.startswith(_OF_TOKENIZERS)
    ]


class Renumbering:
    """What an export does to the files that name experts.

    Parameters
    ----------
    layout
        The names of the family.
    tensors
        The tensors of the checkpoint.
    new_numbers
        By the model's own number of each MoE layer, ``[E]``: new number of each expert.
        In other layers experts keep their numbers.
    """

    def __init__(
        self,
        layout: TensorLayout,
        tensors: Iterable[str],
        new_numbers: Mapping[int, IntArray],
    ) -> None:
        self._layout = layout
        self._new_numbers = new_numbers
        self._modules = ExpertModules(layout, tensors, new_numbers)
        self._most = max(len(numbers) for numbers in new_numbers.values())

    def configs(self, directory: Path, files: Iterable[Path]) -> dict[str, bytes]:
        """Return the files, relative to the directory, that change, renumbered.

        Raises
        ------
        PlacerError
            If one picks single experts in another way than by their plain name, and would
            pick others.
        """
        found = {}
        for relative in description_files(files):
            path = directory / relative
            text = read_text(path)
            value = _decoded(text, path)
            self._require_no_numbers(value, path, ())
            renumbered = replace_texts(text, self._replaced(_texts(value), path), path)
            if renumbered != text:
                found[relative.as_posix()] = renumbered.encode()
        return found

    def stale(self, directory: Path, files: Iterable[Path]) -> tuple[Path, ...]:
        """Return the files that name experts by their old numbers after an export.

        They are copied as they are, because no engine reads them.
        """
        found = []
        for relative in files:
            path = directory / relative
            small = path.is_file() and path.stat().st_size <= _MOST_NOTED
            if relative.name.endswith(_NOTES) and small and self._is_stale(path):
                found.append(relative)
        return tuple(found)

    def _is_stale(self, path: Path) -> bool:
        """Return whether a text names experts whose numbers change."""
        for word in set(_WORDS.findall(read_text(path))):
            try:
                if any(old != new for old, new in self._replaced([word], path).items()):
                    return True
            except PlacerError:
                return True
        return False

    def metadata(self, metadata: Mapping[str, str], path: Path) -> dict[str, str]:
        """Return the texts of a shard's metadata that change, keys included.

        torchao writes down the names of all tensors, and some of them as JSON in a text.

        Raises
        ------
        PlacerError
            As :meth:`configs` does.
        """
        replaced: dict[str, str] = {}
        for text in dict.fromkeys((*metadata, *metadata.values())):
            value = _decoded(text, path) if text.startswith(("{", "[")) else None
            if value is None:
                replaced |= self._replaced([text], path)
            else:
                inner = self._replaced(_texts(value), path)
                replaced[text] = replace_texts(text, inner, path)
        return {old: new for old, new in replaced.items() if old != new}

    def _replaced(self, texts: Iterable[str], source: Path) -> dict[str, str]:
        """Return what becomes of the texts that name experts."""
        told = dict.fromkeys(texts)
        named = [one for one in told if _NAMED.search(one)]
        all_or_none = _all_or_none(named, self._most)
        replaced = {}
        for text in told:
            if text in all_or_none:
                continue
            plain = self._renumbered(text)
            if plain is not None:
                replaced[text] = plain
            elif is_pattern(text) or _NAMED.search(text):
                # What seems to name an expert, and picks none, is not understood.
                lost = _NAMED.search(text) and not self._modules.picks(text)
                if lost and is_pattern(text):
                    lost = not self._modules.picks_alike_elsewhere(text)
                if lost or self._modules.picks_others(text):
                    raise _refused(text, source)
        return replaced

    def _renumbered(self, text: str) -> str | None:
        """Return a plain name with the new number, ``None`` if it is none of an expert."""
        plain = _PLAIN.fullmatch(text)
        if plain is None or "expert" not in text:
            return None
        for root, own in self._roots(plain["name"]):
            # Lists of modules leave out the name of the parameter.
            rest = plain["name"][len(own) :]
            place = self._layout.classify(f"{root}{rest}.weight")
            if place is None:
                continue
            if place.kind is None:
                return None
            numbers = self._new_numbers.get(-1 if place.layer is None else place.layer)
            if place.expert is None or numbers is None:
                return text
            if place.expert >= len(numbers):
                return None
            name = place.template.replace("{expert}", str(numbers[place.expert]))
            name = own + name.removeprefix(root).removesuffix(".weight")
            return f"{plain['before']}{name}{plain['after']}"
        return None

    def _roots(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield what to put in place of the beginning of a name, and that beginning.

        Some lists leave out the name of the model, and some have that of an engine's class.
        """
        yield "", ""
        yield "model.", ""
        found = LAYERS.match(name)
        if found is not None and found[0] in ROOTS:
            for block in self._layout.blocks:
                if (root := LAYERS.match(block.replace("{layer}", "0"))) is not None:
                    yield root[0], found[0]

    def _require_no_numbers(self, value: Any, source: Path, keys: tuple[str, ...]) -> None:
        """Refuse numbers of experts that are no part of a name, such as MoNE's."""
        if isinstance(value, dict):
            for key, one in value.items():
                self._require_no_numbers(one, source, (*keys, str(key)))
        words = {word for key in keys for word in key.lower().split("_")}
        if not words & {"expert", "experts"} or words & _MEASURES:
            return
        if keys[-1].lower().endswith(_OF_LAYERS):
            return
        if isinstance(value, dict):
            numbers = [int(key) for key in value if key.isdecimal()]
        elif isinstance(value, list):
            numbers = [one for one in _flat(value) if type(one) is int]
        elif isinstance(value, str) and _LISTED.fullmatch(value):
            numbers = [int(one) for one in re.findall(r"\d+", value)]
        else:
            return
        if numbers and len(set(numbers)) == len(numbers) and max(numbers) < self._most:
            raise PlacerError(
                f"{source} names experts by number in {'.'.join(keys)}; in the export, "
                "these numbers belong to other experts",
                "remove it if no engine reads it",
            )


def _flat(value: Any) -> Iterator[Any]:
    """Yield what lists in lists hold."""
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _decoded(text: str, source: Path) -> Any:
    """Return what a text is in JSON; ``None`` if it is JSON to no reader.

    Raises
    ------
    PlacerError
        If it nests too deep.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return None
    except RecursionError:
        value = parse_json(text, str(source))
    require_bounds(value, str(source))
    return value


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


def _all_or_none(texts: Iterable[str], num_experts: int) -> frozenset[str]:
    """Return the texts that name all experts of all layers in the same way.

    GPTQ lists what it quantised in any layer (``modules_in_block_to_quantize``), for
    example ``block_sparse_moe.experts.0.w1`` and the same of each other expert.
    """
    experts: dict[str, dict[str, str]] = defaultdict(dict)
    for text in texts:
        if found := _IN_ANY_LAYER.fullmatch(text):
            experts[found["before"] + "{}" + found["after"]][found["number"]] = text
    wanted = {str(number) for number in range(num_experts)}
    return frozenset(
        text
        for named in experts.values()
        if named.keys() == wanted
        for text in named.values()
    )


def _refused(text: str, source: Path) -> PlacerError:
    return PlacerError(
        f"{source} names single experts: {text}",
        "remove it if it is not needed. Else replace it by the plain names of the "
        "modules, one by one: placer renumbers those",
    )
