"""Which files other than tensors are served: an export leaves out the rest.

Weights that are not rewritten would contradict the rewritten ones. So what is
copied is text, or of a kind that is known to hold no weights.
"""

import os
from pathlib import Path

from placer.errors import PlacerError
from placer.run.files import open_regular

# What git and the Hugging Face client keep next to a checkpoint is not part of it.
_FOREIGN_FOLDERS = (".git", ".cache")
# Weights, archives of anything, and states of training, as other libraries call them.
_LEFT_OUT = {
    *(".bin", ".pt", ".pth", ".pt2", ".ptl", ".pte", ".ckpt", ".distcp", ".nemo", ".jit"),
    *(".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".tflite"),
    *(
        ".npy",
        ".npz",
        ".pkl",
        ".pickle",
        ".joblib",
        ".pb",
        ".ot",
        ".pdparams",
        ".pdiparams",
    ),
    *(".mlmodel", ".engine", ".plan", ".trt", ".weights", ".mnn", ".rknn", ".pdiparams"),
    *(".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z"),
    *(".lock", ".part", ".partial", ".incomplete", ".tmp"),
}
# Tokenizers, pictures and sounds.
_BINARY = {
    *(".model", ".spm", ".tiktoken", ".bpe", ".pdf", ".ttf"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".ico", ".wav", ".mp3", ".mp4", ".flac"),
}
_LOOKED_AT = 1 << 16


def served_files(
    directory: Path, weights: set[str]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the files to copy and those to leave out, relative to the directory.

    A folder with weights that are left out, such as ``original`` or ``onnx``, is left out
    as a whole: the rest of it describes them.

    Parameters
    ----------
    directory
        The checkpoint.
    weights
        Names of files that the export writes itself.

    Raises
    ------
    PlacerError
        If a link to be copied leads out of the checkpoint, or something in it is no file.
    """
    served: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if relative.parts[0] in _FOREIGN_FOLDERS:
            continue
        if relative.as_posix() in weights or (path.is_dir() and not path.is_symlink()):
            continue
        if path.exists() and not path.is_file() and not path.is_symlink():
            raise PlacerError(
                f"{path} is a pipe, a device or a socket, which cannot be copied",
                "move it out of the checkpoint",
            )
        (left_out if _holds_weights(path) else served).append(relative)
    folders = {Path(name).parts[0] for name in weights if len(Path(name).parts) > 1}
    dropped = {one.parts[0] for one in left_out if len(one.parts) > 1} - folders
    left_out += [one for one in served if one.parts[0] in dropped]
    served = [one for one in served if one.parts[0] not in dropped]
    for one in served:
        require_inside(directory, directory / one)
    return tuple(served), tuple(sorted(left_out))


def left_out_line(left_out: tuple[Path, ...]) -> str | None:
    """Return the line on files that are not copied, ``None`` if all are."""
    if not left_out:
        return None
    names = [str(path) for path in left_out[:4]]
    more = f" and {len(left_out) - len(names)} more" if len(left_out) > len(names) else ""
    return (
        f"left out, because engines do not load it: {', '.join(names)}{more} (weights in "
        "another format, weights that are there twice, training states)"
    )


def _holds_weights(path: Path) -> bool:
    """Return whether a file holds, or may hold, weights: not text, and of no known kind."""
    if path.suffix.lower() in _LEFT_OUT or ".onnx" in path.name:
        return True
    if path.name.endswith((".safetensors.index.json", ".bin.index.json")):
        return True  # of weights that are left out
    if path.suffix.lower() in _BINARY or path.name.startswith(("tokenizer.", "vocab")):
        return False
    if not path.is_file():  # a link to nothing, or to a folder
        return False
    with open_regular(path) as stream:
        start = stream.read(_LOOKED_AT)
    # A character may be cut at the end.
    return b"\0" in start or "\ufffd" in start.decode("utf-8", "replace")[:-4]


def require_inside(directory: Path, path: Path) -> None:
    """Refuse a link out of the checkpoint, whose target would be copied as part of it.

    The cache of Hugging Face is made of links too: ``snapshots/REVISION/FILE`` points to
    ``blobs``, next to ``snapshots``.

    Raises
    ------
    PlacerError
        If the target is outside the checkpoint.
    """
    # Unlike the method of Path it also takes names that no file system can hold.
    if not os.path.islink(path):
        return
    own, target = directory.resolve(), path.resolve()
    blobs = own.parent.parent / "blobs"
    if path.is_file() and (target.is_relative_to(own) or target.parent == blobs):
        return
    raise PlacerError(
        f"{path} is a link to {target}, which is outside the checkpoint",
        "if you want that file, copy the checkpoint with the files of its links: cp -rL "
        f"{directory} COPY",
    )
