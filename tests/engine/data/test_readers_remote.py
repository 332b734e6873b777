"""Zarr, N5 and precomputed volumes from a local HTTP server and a local S3 server."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from affmae_engine.data.ingest import ingest
from affmae_engine.data.readers import find_files, open_sources, sandbox, scan_sources
from affmae_engine.data.readers.files import as_path, is_remote
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError, ResourceError

pytestmark = pytest.mark.slow
ts = pytest.importorskip("tensorstore")
ALL = slice(None)
BLOCK = np.random.default_rng(0).integers(0, 60000, (6, 70, 80), np.uint16)


class Server:
    """Serves a folder; answers the first `failures` requests for chunks with 503."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.failures = 0
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if outer.failures and "json" not in self.path:
                    outer.failures -= 1
                    self.send_error(503)
                    return
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    one = Server(tmp_path / "served")
    yield one
    one.close()


def ome_zarr(path: Path, version: int) -> None:
    group = zarr.create_group(path, zarr_format=version)
    for level, part in enumerate((BLOCK, BLOCK[:, ::2, ::2])):
        group.create_array(str(level), shape=part.shape, dtype=part.dtype, chunks=(2, 32, 32))[:] = part
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    scale = [{"type": "scale", "scale": [40.0, 4.0, 5.0]}]
    images = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}], "version": "0.4"}]
    group.attrs.update({"multiscales": images} if version == 2 else {"ome": {"version": "0.5", "multiscales": images}})


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_over_http_is_read_lazily_and_retried(tmp_path: Path, server: Server, version: int) -> None:
    ome_zarr(tmp_path / "served" / "em.ome.zarr", version)
    (source,) = open_sources(as_path(f"{server.url}/em.ome.zarr"))
    assert source.info.shape_ZYX == BLOCK.shape
    assert source.info.pixel_nm == (40, 4, 5)
    assert source.info.name == "em"
    assert not [path for path in server.asked if "json" not in path and ".z" not in path.rsplit("/", 1)[-1]]
    server.asked.clear()
    server.failures = 2
    np.testing.assert_array_equal(source.read(slice(0, 2), slice(0, 30), slice(0, 30)), BLOCK[:2, :30, :30])
    assert server.failures == 0
    # One chunk, asked for until it came.
    assert len({path for path in server.asked if "json" not in path and ".zarray" not in path}) == 1
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)


def test_n5_precomputed_and_consolidated_groups_over_http(tmp_path: Path, server: Server) -> None:
    served = tmp_path / "served"
    write_n5(served / "a.n5" / "raw" / "s0", {})
    size = {"pixelResolution": {"unit": "nm", "dimensions": [4, 5, 40]}}
    (served / "a.n5" / "raw" / "attributes.json").write_text(json.dumps(size))
    write_precomputed(served / "pre")
    group = zarr.create_group(served / "g.zarr")
    for name in ("one", "two/deep"):
        group.create_array(name, shape=BLOCK.shape, dtype=BLOCK.dtype, chunks=(2, 32, 32))[:] = BLOCK
    zarr.consolidate_metadata(group.store)
    for url in ("a.n5/raw", "pre"):  # of a pyramid the first level is found
        (source,) = open_sources(as_path(f"{server.url}/{url}"))
        np.testing.assert_array_equal(source.read(slice(1, 5), slice(3, 60), ALL), BLOCK[1:5, 3:60])
        assert source.info.pixel_nm == (40, 5, 4)
    sources = open_sources(as_path(f"{server.url}/g.zarr"))
    assert [source.info.series for source in sources] == ["one", "two/deep"]
    np.testing.assert_array_equal(sources[1].read(ALL, ALL, ALL), BLOCK)


def write_n5(path: Path, attributes: dict[str, Any]) -> None:
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/"}, "create": True}
    metadata = {
        "dataType": "uint16",
        "dimensions": [80, 70, 6],
        "blockSize": [32, 32, 4],
        "compression": {"type": "gzip"},
    }
    ts.open({**spec, "metadata": metadata}).result()[...] = BLOCK.T
    merged = json.loads((path / "attributes.json").read_text()) | attributes
    (path / "attributes.json").write_text(json.dumps(merged))


def write_precomputed(path: Path, kind: str = "image") -> None:
    spec = {
        "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": f"{path}/"}, "create": True,
        "multiscale_metadata": {"type": kind, "data_type": "uint16", "num_channels": 1},
        "scale_metadata": {"size": [80, 70, 6], "resolution": [4, 5, 40], "encoding": "raw", "chunk_size": [32, 32, 4],
                           "voxel_offset": [100, 200, 300]},
    }  # fmt: skip
    ts.open(spec).result()[...] = BLOCK.T[..., None]


def test_a_remote_stack_is_ingested_and_known_again(tmp_path: Path, server: Server) -> None:
    ome_zarr(tmp_path / "served" / "em.ome.zarr", 3)
    url = f"{server.url}/em.ome.zarr"
    report = ingest([url], tmp_path / "store.zarr")
    assert [(image.source_path, image.shape_ZYX) for image in report.taken] == [(url, BLOCK.shape)]
    np.testing.assert_array_equal(Store.open(tmp_path / "store.zarr").read("em", ALL, ALL, ALL), BLOCK)
    again = ingest([as_path(url)], tmp_path / "store.zarr")
    assert not again.taken and len(again.present) == 1


def test_urls_are_kept_by_paths() -> None:
    for url in ("s3://bucket/a b/c.zarr", "https://host:80/x", "gs://bucket/x"):
        assert str(as_path(url)) == url
        assert str(as_path(Path(url))) == url  # a Path has lost a slash
        assert find_files([url]) == [as_path(url)] and is_remote(as_path(url))
    assert str(as_path(Path("precomputed://gs://bucket/x"))) == "gs://bucket/x"
    assert not is_remote(as_path("s3/x")) and not is_remote(as_path("/https:/x"))


def test_what_is_not_there_or_cannot_be_listed(tmp_path: Path, server: Server) -> None:
    with pytest.raises(InputError, match=r"http://.*/none.*there is no zarr\.json"):
        open_sources(as_path(f"{server.url}/none"))
    zarr.create_group(tmp_path / "served" / "g.zarr").create_array("a", shape=(9, 9), dtype="u1")
    with pytest.raises(InputError, match="cannot be listed") as caught:
        open_sources(as_path(f"{server.url}/g.zarr"))
    assert "name one array" in caught.value.hint
    (tmp_path / "served" / "bad.zarr").mkdir()
    (tmp_path / "served" / "bad.zarr" / "zarr.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_sources(as_path(f"{server.url}/bad.zarr"))


@pytest.mark.slow
def test_a_server_that_is_not_there_ends_the_command() -> None:
    with pytest.raises(ResourceError, match="does not answer") as caught:
        open_sources(as_path("http://127.0.0.1:9/x.zarr"))
    assert "network" in caught.value.hint


def test_s3_anonymously_and_with_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    one = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    try:
        url = "http://{}:{}".format(*one.get_host_and_port())
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="volumes")
        ome_zarr(tmp_path / "em.zarr", 3)
        for file in (tmp_path / "em.zarr").rglob("*.json"):
            for access in ("public-read", "private"):
                key = f"{access}/em.zarr/{file.relative_to(tmp_path / 'em.zarr').as_posix()}"
                client.put_object(Bucket="volumes", Key=key, Body=file.read_bytes(), ACL=access)
        for file in (tmp_path / "em.zarr" / "0" / "c").rglob("*"):
            if file.is_file():
                key = f"public-read/em.zarr/{file.relative_to(tmp_path / 'em.zarr').as_posix()}"
                client.put_object(Bucket="volumes", Key=key, Body=file.read_bytes(), ACL="public-read")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        sandbox.end_children()  # they have the environment of their start
        sources, refused = scan_sources(Path("s3:/volumes/public-read/em.zarr"))
        assert not refused and sources[0].info.pixel_nm == (40, 4, 5)
        np.testing.assert_array_equal(sources[0].read(slice(2, 5), ALL, ALL), BLOCK[2:5])
        with pytest.raises(InputError, match="access was denied") as caught:
            open_sources(Path("s3:/volumes/private/em.zarr"))
        assert "AWS_PROFILE" in caught.value.hint
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        sandbox.end_children()
        assert open_sources(Path("s3:/volumes/private/em.zarr"))[0].info.shape_ZYX == BLOCK.shape
    finally:
        sandbox.end_children()
        one.stop()
