"""Reads `.bin` files written by `torch.save` without torch, and without running anything in them.

A `.bin` file is a zip archive: `<prefix>/data.pkl` describes the tensors, `<prefix>/data/<key>`
holds their bytes. The archive's names are looked up, never used as paths; members must be stored
uncompressed, so that nothing can grow and tensors can be memory-mapped where they are.
"""

import struct
import zipfile
from pathlib import Path

from convert.files.foreign import GGML, USE_TORCH, is_ggml
from convert.files.tensor import StoredTensor, bad_file, regular_file_size
from convert.files.torch_pickle import TorchTensor, read_state_dict
from glm2_jax.errors import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
MAX_MEMBERS = 100_000

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a `.bin` file; their bytes stay in the file.

    Args:
        path: a file in the zip format of torch >= 1.6.

    Returns:
        name -> tensor, in the order of the file.

    Raises:
        CheckpointError: not such a file, truncated, compressed, inconsistent, or its pickle asks
            for anything but tensors. The message names the file and the reason.
    """
    size = regular_file_size(path)
    with path.open("rb") as file:
        _check_container(path, file.read(512), size)
        try:
            with zipfile.ZipFile(file) as zip_file:
                members = zip_file.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
            why = f"The directory at the end of the archive cannot be read ({str(error)[:200]})."
            what = f"is truncated or damaged: it has {size} bytes"
            raise bad_file(path, what, why) from error
        archive = _Archive(path, file, size, members)
        pickle = archive.read(f"{archive.prefix}/data.pkl", MAX_PICKLE_BYTES)
        tensors = read_state_dict(pickle, path)
        return {name: archive.locate(name, tensor) for name, tensor in tensors.items()}


def _check_container(path: Path, start: bytes, size: int) -> None:
    """Refuse what is not a zip archive, by name where it is something known."""
    if start.startswith(b"PK\x03\x04"):
        return
    if is_ggml(start):
        raise CheckpointError(f"{path} is {GGML}.", fix=USE_TORCH)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        raise CheckpointError(
            f"{path} is a safetensors file.",
            "A .bin file must be one of torch.save.",
            "Give it a name that ends in .safetensors, and name it so in its index if it has one.",
        )
    if start.startswith(b"\x80") or start[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} cannot be read.",
            "It is a bare pickle or of torch < 1.6, which could run code when opened.",
            "Save it again with a recent torch: torch.save(torch.load(FILE, weights_only=True), "
            "FILE).",
        )
    raise CheckpointError(
        f"{path} is not a torch file.",
        f"It begins with {start[:8]!r} instead of a zip header." if size else "It is empty.",
        "Download it again; a web page saved under that name is a common cause.",
    )


class _Archive:
    """The members of one archive: found by name, checked, located in the file."""

    def __init__(self, path: Path, file, size: int, members: list[zipfile.ZipInfo]):
        self.path, self.file, self.size = path, file, size
        if len(members) > MAX_MEMBERS:
            raise self.error(f"it has {len(members)} members; {MAX_MEMBERS} are the limit")
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            if member.filename in self.members:
                raise self.error(f"the member {member.filename[:100]!r} appears twice")
            self.members[member.filename] = member
        roots = [name for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise self.error(f"it holds {len(roots)} members PREFIX/data.pkl instead of one")
        self.prefix = roots[0].removesuffix("/data.pkl")
        order = f"{self.prefix}/byteorder"
        if order in self.members and self.read(order, 16).strip() != b"little":
            raise self.error("its numbers are not little-endian")

    def error(self, reason: str) -> CheckpointError:
        return bad_file(self.path, f"is not a valid torch file: {reason}")

    def position(self, name: str) -> int:
        """Return the first byte of a member, after its checks."""
        member = self.members.get(name)
        if member is None:
            raise self.error(f"the member {name[:100]!r} is missing")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise self.error(
                f"the member {name[:100]!r} is compressed "
                f"({member.compress_size} -> {member.file_size} bytes), which torch never does"
            )
        if member.flag_bits & 0x1:
            raise self.error(f"the member {name[:100]!r} is encrypted")
        header = b""
        if 0 <= member.header_offset < self.size:
            self.file.seek(member.header_offset)
            header = self.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise self.error(f"the header of {name[:100]!r} is not where the directory says")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + member.file_size > self.size:
            end = start + member.file_size
            why = f"{name[:100]} ends at byte {end}; the file has {self.size} bytes."
            raise bad_file(self.path, "is truncated", why)
        return start

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small member."""
        start, length = self.position(name), self.members[name].file_size
        if length > limit:
            raise self.error(f"{name[:100]!r} has {length} bytes; {limit} are the limit")
        self.file.seek(start)
        return self.file.read(length)

    def locate(self, name: str, tensor: TorchTensor) -> StoredTensor:
        """Return where the elements of a tensor are in the file."""
        dtype, member = tensor.storage.dtype, f"{self.prefix}/data/{tensor.storage.key}"
        start, expected = self.position(member), tensor.storage.numel * dtype.itemsize
        if self.members[member].file_size != expected:
            raise self.error(
                f"the storage of {name[:200]!r} has {self.members[member].file_size} bytes "
                f"instead of {expected}"
            )
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        offset = start + tensor.offset * dtype.itemsize
        return StoredTensor(
            self.path, dtype, tensor.shape, offset, None if tensor.contiguous else strides
        )
