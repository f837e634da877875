"""Addresses: each kind is read from where it says, and no other kind is put in its place."""

import fsspec
import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from misbehaving import CONTENT, QUICK, Heard, Server, Wanted, planned  # pyright: ignore[reportMissingImports]

from mplug2.errors import DownloadError
from mplug2.hub.download import fetch

pytestmark = pytest.mark.usefixtures("online")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/f", "is a http address"),
        ("ftp://example.org/f", "is a ftp address"),
        ("https:///f", "addresses of files begin with"),
        ("file://elsewhere/f", "three slashes"),
        ("file:///nowhere/at/all", "there is no such file"),
        ("file:///dev/zero", "there is no such file"),
        ("hf://only-one-name/f", "hf://owner/name@revision/path"),
        ("hf://a/b@main/../../c", "hf://owner/name@revision/path"),
        ("gs://bucket/f", "gs:// needs the package gcsfs"),
    ],
)
def test_an_address_that_will_not_do_is_refused(url, said, cache):
    with pytest.raises(DownloadError, match=said):
        fetch(Wanted((url,)), cache, patience=QUICK)


def test_plain_http_is_spoken_to_no_host_by_default(cache):
    with Server(CONTENT, planned("good")) as server, pytest.raises(DownloadError, match="is a http address"):
        fetch(Wanted((server.url("f"),)), cache)
    assert not server.log


def test_a_file_of_this_machine_is_copied(cache, tmp_path):
    (tmp_path / "the file").write_bytes(CONTENT)
    url = (tmp_path / "the file").as_uri()
    assert "%20" in url
    assert fetch(Wanted((url,)), cache).read_bytes() == CONTENT


def test_an_address_on_the_hub_is_resolved_and_its_token_stays_with_its_host(cache, monkeypatch):
    tokens = []
    with Server(CONTENT, lambda path: (tokens.append(1), "to_other_host")[1]) as server:
        monkeypatch.setattr(
            huggingface_hub,
            "hf_hub_url",
            lambda name, path, revision: server.url(f"{name}/{revision}/{path}"),
        )
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
        seen = []
        real = Server.answer
        monkeypatch.setattr(
            Server, "answer", lambda s, r: (seen.append(r.headers.get("Authorization")), real(s, r))[1]
        )
        assert fetch(Wanted(("hf://owner/name@v1/a/b.safetensors",)), cache, patience=QUICK).is_file()
    assert server.log[0][0] == "owner/name/v1/a/b.safetensors"
    assert seen == ["Bearer secret", None]


def test_an_object_store_is_read_and_resumed(cache, monkeypatch):
    class Store(MemoryFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("s3://", "memory://"))

    fsspec.register_implementation("s3", Store, clobber=True)
    with fsspec.open("memory://bucket/f", "wb") as file:
        file.write(CONTENT)  # pyright: ignore[reportAttributeAccessIssue]
    wanted = Wanted(("s3://bucket/f",))
    validator = str(Store().ukey("/bucket/f"))
    partial = cache.partial(wanted.sha256)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:5000])
    cache.note(wanted.sha256, {"url": wanted.urls[0], "validator": validator})
    heard = Heard()
    assert fetch(wanted, cache, meter=heard).read_bytes() == CONTENT
    assert heard.places[0] == 5000 and 0 not in heard.places
