"""What lies where weights or texts should be: files that git, downloads and archives leave in their place."""

import re

_NO_WEIGHTS = "not PyTorch's format nor safetensors"
_KNOWN: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs\.github\.com/",
        "a pointer of git-lfs, not the file: git lfs pull fetches it",
    ),
    (
        rb"(\.\./)*(\.git/annex|/?annex)/objects/",
        "a pointer of git-annex, not the file: git annex get fetches it",
    ),
    (
        rb"\s*<(!doctype|html|\?xml|head)",
        "a page of a web site: the download needs another address, or a login",
    ),
    (rb"\s*\{\s*\"(error|message|detail)\"", "a server's refusal in JSON, not the file"),
    (rb"<<<<<<< ", "a file with an unresolved conflict of git"),
    (rb"\x1f\x8b", "compressed by gzip: unpack it first"),
    (rb"\xfd7zXZ\x00", "compressed by xz: unpack it first"),
    (rb"BZh[1-9]", "compressed by bzip2: unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (rb"\x89HDF\r\n", f"HDF5 (Keras), {_NO_WEIGHTS}"),
    (rb"GGUF", f"GGUF (llama.cpp), {_NO_WEIGHTS}"),
    (rb"\x93NUMPY", f"a NumPy array, {_NO_WEIGHTS}"),
)
"""How such files begin."""


def mistaken(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of weights, JSON or a vocabulary; None where that does
    not show."""
    if not head.strip(b"\x00"):
        return "nothing but zeros: its download was cut off" if head else "empty"
    return next((what for pattern, what in _KNOWN if re.match(pattern, head, re.IGNORECASE)), None)
