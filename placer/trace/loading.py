"""Loading a model with transformers, and a hash that identifies its weights."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from placer.errors import PlacerError
from placer.run.files import open_regular

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

# The oldest transformers with which the experts and ties of every family are right.
_OLDEST = (5, 15)

# Blocks of a weight file that are read to distinguish it from another: the first, the last
# and some between.
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def load_model(
    directory: Path, *, dtype: Dtype, device: str, device_map: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer with transformers.

    With ``device_map`` accelerate spreads it over devices, and ``device`` is not used.

    Raises
    ------
    PlacerError
        If transformers is not installed or cannot load the directory.
    """
    model = load_causal_model(directory, dtype=dtype, device=device, device_map=device_map)
    from transformers import AutoTokenizer

    with _loading(directory):
        return model, AutoTokenizer.from_pretrained(directory)


def load_causal_model(
    directory: Path, *, dtype: Dtype, device: str, device_map: str | None = None
) -> Any:
    """Load a model as :func:`load_model` does, without its tokenizer.

    Raises
    ------
    PlacerError
        If transformers is missing or too old, or cannot load the model.
    """
    try:
        from transformers import AutoModelForCausalLM, __version__
        from transformers.utils import logging
    except ImportError as error:
        raise PlacerError(
            "running a model needs transformers, which is not installed",
            "pip install 'placer[record]'",
        ) from error
    _require_new_enough(__version__)
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise PlacerError(
            f"--device-map {device_map} needs accelerate, which is not installed",
            "pip install accelerate",
        )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # placer has its own
    with _loading(directory):
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map=device_map
        )
    if device_map is None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            raise PlacerError(
                f"the model cannot be moved to --device {device}: "
                f"{str(error).strip().splitlines()[0]}",
                "name another device, or spread the model: --device-map auto",
            ) from error
    return model.eval()


def _require_new_enough(version: str) -> None:
    """Refuse a transformers whose routers return what placer would misread.

    Before 5.15 routers of DeepSeek-V3, GLM-4 and others return scores alone, without the
    choice, which also depends on biases and groups: ties would be wrong.
    """
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise PlacerError(
            f"transformers {version} is too old: placer needs {oldest} or newer",
            f"pip install --upgrade 'transformers>={oldest},<6'",
        )


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    """Say what transformers could not load."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises just that
        reason = str(error).strip().splitlines()
        raise PlacerError(
            f"transformers cannot load {directory}: {reason[0] if reason else error!r}",
            f"check the directory: placer inspect {directory}",
        ) from error


def require_embedded(ids: Sequence[int], model: Any, directory: Path) -> None:
    """Refuse token ids of a tokenizer that the model has no embedding of.

    Raises
    ------
    PlacerError
        If there is one.
    """
    num_embedded, highest = len(model.get_input_embeddings().weight), max(ids, default=0)
    if highest >= num_embedded:
        raise PlacerError(
            f"the tokenizer of {directory} gives token id {highest}, but the model embeds "
            f"only {num_embedded} ids",
            "put the tokenizer that the model was trained with into the directory",
        )


def weights_sample_sha256(directory: Path) -> str:
    """Return a SHA-256 of the names, sizes and evenly spaced blocks of the weight files.

    It costs a few reads at any size. A model trained further or quantised again has
    another one; a few bytes that were changed elsewhere go unseen.
    """
    digest = hashlib.sha256()
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(os.fsencode(path.name) + b"\0" + str(size).encode() + b"\0")
        with open_regular(path) as opened:
            for sample in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
