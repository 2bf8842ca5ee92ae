"""Reading a trace, chunk by chunk."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from placer.errors import PlacerError
from placer.model import ModelSpec, recorded_tokenizer
from placer.run.files import memory_bytes, read_bytes, sha256_file
from placer.trace.chunk import Chunk
from placer.trace.header import AGAIN, HEADER_NAME, ChunkInfo, TraceHeader
from placer.trace.selection import EVERYTHING, Selection


class Trace:
    """A trace directory, opened for reading.

    Parameters
    ----------
    directory
        The directory that ``placer record`` or ``placer import`` wrote.

    Raises
    ------
    PlacerError
        If it is no complete trace.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.header = TraceHeader.read(directory)

    @property
    def model(self) -> ModelSpec:
        """The model whose router was recorded."""
        return self.header.model

    @property
    def sha256(self) -> str:
        """SHA-256 of ``trace.json``, which holds the hashes of all chunks."""
        return sha256_file(self.directory / HEADER_NAME)

    @property
    def tokenizer_sha256(self) -> str | None:
        """SHA-256 of the ``tokenizer.json`` that made the token ids, where recorded."""
        return recorded_tokenizer(self.header.provenance)

    def chunks(
        self, selection: Selection = EVERYTHING, start: int = 0, stop: int | None = None
    ) -> Iterator[Chunk]:
        """Yield the chunks in order, verified, restricted to the tokens selected.

        Only those at ``start`` to ``stop - 1`` of the header's list, where given.

        Raises
        ------
        PlacerError
            If a chunk is damaged, or a phase is selected and the trace records none.
        """
        for _, chunk in self.whole_chunks(start, stop):
            if selection != EVERYTHING:
                chunk = chunk.select(selection.keep(chunk))
            if chunk.num_tokens:
                yield chunk

    def whole_chunks(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Path, Chunk]]:
        """Yield the file and the tokens of every chunk, as :meth:`chunks` verifies them."""
        last_sequence = -1
        if start:
            before = self._read(self.header.chunks[start - 1])
            last_sequence = int(before.sequence_ids[-1]) if before.num_tokens else -1
        for info in self.header.chunks[start:stop]:
            chunk = self._read(info)
            if chunk.num_tokens and chunk.sequence_ids[0] == last_sequence:
                raise PlacerError(
                    f"sequence {last_sequence} continues in {self.directory / info.file}, "
                    "but a chunk holds whole sequences",
                    AGAIN,
                )
            last_sequence = (
                int(chunk.sequence_ids[-1]) if chunk.num_tokens else last_sequence
            )
            yield self.directory / info.file, chunk

    def read(self, selection: Selection = EVERYTHING) -> Chunk:
        """Return all selected tokens in memory as one chunk."""
        return Chunk.concatenate(self.chunks(selection))

    def _read(self, info: ChunkInfo) -> Chunk:
        path = self.directory / info.file
        if Path(info.file).name != info.file:
            raise PlacerError(
                f"{self.directory}: chunk name {info.file!r} is a path", AGAIN
            )
        if not path.is_file():
            raise PlacerError(
                f"{self.directory} lists chunk {info.file}, which does not exist",
                AGAIN,
            )
        data = read_bytes(path, memory_bytes(), "chunk")
        found = hashlib.sha256(data).hexdigest()
        if found != info.sha256:
            raise PlacerError(
                f"chunk {path} is damaged: SHA-256 {found[:12]}, "
                f"but trace.json says {info.sha256[:12]} ({len(data)} bytes on disk)",
                "copy the trace again, or record it again",
            )
        try:
            chunk = Chunk.from_tensors(load(data), self.model.num_layers)
            chunk.require_within(self.model)
        except (SafetensorError, TypeError, KeyError) as error:
            # The latter two are of dtypes that NumPy does not have, such as bfloat16.
            raise PlacerError(f"chunk {path}: {error}", AGAIN) from error
        except PlacerError as error:
            raise PlacerError(f"chunk {path}: {error}", error.hint or AGAIN) from error
        if chunk.num_tokens != info.num_tokens:
            raise PlacerError(
                f"chunk {path} holds {chunk.num_tokens} tokens, "
                f"but trace.json says {info.num_tokens}",
                AGAIN,
            )
        self._require_domains(chunk, path)
        return chunk

    def _require_domains(self, chunk: Chunk, path: Path) -> None:
        if chunk.domain_ids is None or not chunk.num_tokens:
            return
        last, number = int(chunk.domain_ids.max()), len(self.header.domains)
        if last >= number:
            raise PlacerError(
                f"chunk {path}: domain_ids holds {last}, but trace.json names "
                f"{number} domains",
                AGAIN,
            )
