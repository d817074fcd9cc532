"""Packs a folder as a .tar.gz whose bytes depend only on its files' names and contents (and the installed zlib).

python -m benchmarks.xglue.examples.pack FOLDER ARCHIVE
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path


def pack(files: dict[str, bytes], level: int = 9) -> bytes:
    """Packs {name: contents} as a .tar.gz, sorted by name, without times, owners and modes. level: zlib's, 0 to 9."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=packed, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return packed.getvalue()


def unpack(packed: bytes) -> dict[str, bytes]:
    """Inverts pack()."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    paths = [path for path in folder.rglob("*") if path.is_file()]
    target.write_bytes(pack({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}))
