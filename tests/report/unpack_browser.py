"""Unpack the Chromium of ``browser.npm``: a headless shell, its libraries and a font."""

import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path

_SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
_ARCHIVES = ("al2023", "fonts", "swiftshader")


def unpack(folder: Path) -> None:
    """Unpack the only package in ``folder`` into its folder ``chromium``."""
    sys.path.insert(0, str(folder / "python"))
    import brotli

    (package,) = folder.glob("*.tgz")
    content = package.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        sys.exit(f"{package.name} has SHA-256 {found}, expected {_SHA256}")
    chromium = folder / "chromium"
    chromium.mkdir()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:

        def packed(name: str) -> bytes:
            member = archive.extractfile(f"package/bin/{name}.br")
            assert member is not None
            return bytes(brotli.decompress(member.read()))

        shell = chromium / "headless-shell"
        shell.write_bytes(packed("chromium"))
        shell.chmod(0o755)
        for name in _ARCHIVES:
            with tarfile.open(fileobj=io.BytesIO(packed(f"{name}.tar"))) as inner:
                inner.extractall(chromium, filter="data")
    # The package's own places for fonts are those of the service that it is made for.
    conf = chromium / "fonts.conf"
    fonts = f"<dir>{(chromium / 'fonts').resolve()}</dir>"
    text = re.sub(r"(\s*<dir>.*?</dir>)+", f"\n  {fonts}", conf.read_text(), count=1)
    text = re.sub(
        "<cachedir>.*?</cachedir>", f"<cachedir>{chromium.resolve()}/cache</cachedir>", text
    )
    conf.write_text(text)
    package.unlink()


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
