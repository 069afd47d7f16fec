"""Manifests: inputs that changed, files that were damaged, cached digests, records of earlier versions."""

import hashlib
import json
import os

import pytest

from ram.errors import UserError
from ram.models import run_folder
from ram.storage import provenance
from ram.storage.files import write_json
from ram.storage.provenance import Manifest, cached_sha256, digests_in, read_manifest


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_changed_inputs_are_named():
    manifest = Manifest({"lr": 1e-3, "data": "a"}, {})
    assert manifest.changes({"data": "a", "lr": 1e-3}) == ""
    assert manifest.changes({"lr": 2e-3, "data": "a"}) == "lr: 0.001 -> 0.002"
    assert manifest.changes({"lr": 1e-3}) == "data: a -> None"
    assert Manifest("abc", {}).changes("abc") == ""
    assert Manifest("abc", {}).changes({"lr": 1}) == "settings, weights or rows"


def test_inputs_are_compared_as_json_stores_them():
    """A tuple that was saved comes back as a list; it is the same input."""
    assert Manifest({"ids": [1, 2]}, {}).changes({"ids": (1, 2)}) == ""


def test_damaged_files_are_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    manifest = Manifest({}, {name: sha256(name.encode()) for name in ("a", "b", "c")})
    assert manifest.damaged(digests_in(tmp_path)) == []
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "c").unlink()
    assert manifest.damaged(digests_in(tmp_path)) == ["a", "c"]
    assert manifest.damaged(digests_in(tmp_path), ["b"]) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"inputs": {}, "fi', "not valid JSON"),
        ("[]", "expected a record with inputs and files, inputs is missing.*do this"),
        ('{"inputs": {}}', "files is missing"),
        ('{"inputs": 3, "files": {}}', "inputs is missing"),
    ],
)
def test_damaged_record_is_refused_with_remedy(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"record.json.*{message}"):
        read_manifest(path, "inputs", "files", "do this")


def test_marker_of_an_earlier_version_is_read(tmp_path):
    """The format of FILE.meta.json is the one that earlier versions wrote."""
    path = tmp_path / "output.json"
    path.write_text("[]")
    record = {"made_from": {"seed": 0}, "rows": 0, "sha256": {"output.json": sha256(b"[]")}}
    write_json(provenance.marker(path), record)
    assert provenance.finished(path, {"seed": 0}, overwrite=False, label="x")
    path.write_text("[ ]")
    with pytest.raises(UserError, match="x: .*output.json was changed or cut short"):
        provenance.verify(path, {"seed": 0}, "x")
    assert not provenance.finished(path, {"seed": 1}, overwrite=False, label="x")
    assert {p.name for p in tmp_path.iterdir()} == {"output.json.old", "output.json.meta.json.old"}


def test_marker_is_written_as_before(tmp_path):
    path = tmp_path / "rows.jsonl"
    provenance.write_marked(path, [{"a": 1}], "inputs")
    record = json.loads(provenance.marker(path).read_text())
    assert len(record.pop("digest")) == 64
    assert record == {"made_from": "inputs", "rows": 1, "sha256": {"rows.jsonl": sha256(b'{"a": 1}\n')}}
    assert provenance.is_made_from(path, "inputs") and not provenance.is_made_from(path, "others")


# ---- cached digests ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Every file is large; the list holds the names of the files that are read."""
    monkeypatch.setattr(provenance, "LARGE", 1)
    read, names = provenance.file_sha256, []
    monkeypatch.setattr(provenance, "file_sha256", lambda path: (names.append(path.name), read(path))[1])
    return names


def test_large_file_is_read_once(tmp_path, reads):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert [cached_sha256(path) for _ in range(3)] == [sha256(b"weights")] * 3
    assert reads == ["model.safetensors"]


def test_every_byte_of_a_large_file_counts(tmp_path, reads):
    """A changed byte changes the digest, also if size and time are put back: the inode or time differs."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    before, status = cached_sha256(path), path.stat()
    path.write_bytes(b"weightz")
    assert cached_sha256(path) == sha256(b"weightz") != before
    copy = tmp_path / "copy"
    copy.write_bytes(b"weighty")
    os.utime(copy, ns=(status.st_atime_ns, path.stat().st_mtime_ns))
    os.replace(copy, path)
    assert cached_sha256(path) == sha256(b"weighty") and len(reads) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"model.safetensors": {}}', '{"model.safetensors": 1}'])
def test_damaged_cache_of_digests_is_ignored(tmp_path, reads, text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    (tmp_path / provenance.DIGESTS).write_text(text)
    assert cached_sha256(path) == cached_sha256(path) == sha256(b"weights") and len(reads) == 1


def test_digests_without_a_place_to_keep_them(tmp_path, reads, monkeypatch):
    """In a folder that cannot be written the file is read each time."""

    def refuse(path, value):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(provenance, "write_record", refuse)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert cached_sha256(path) == cached_sha256(path) == sha256(b"weights") and len(reads) == 2


# ---- training runs -----------------------------------------------------------------------------------------

RECORD = {"settings": {}, "inputs": {}, "metrics": {}, "seconds": 1.0}


def test_finished_run_names_the_digest_of_each_file(tmp_path):
    latest = tmp_path / "LATEST"
    latest.mkdir()
    (latest / "config.json").write_text("{}")
    (latest / "model.safetensors").write_bytes(b"weights")
    run_folder.write_done(tmp_path, RECORD)
    record = run_folder.finished_run(tmp_path)
    assert record["files"] == {
        "LATEST/config.json": sha256(b"{}"),
        "LATEST/model.safetensors": sha256(b"weights"),
    }
    run_folder.check_finished(tmp_path, record)
    (latest / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match="LATEST does not hold the weights that done.json describes"):
        run_folder.check_finished(tmp_path, record)


def test_unsampled_byte_of_large_weights_is_noticed(tmp_path, monkeypatch):
    """Every byte of a large file counts. Records of earlier versions, which read blocks, are accepted."""
    from ram.models import checkpoints

    monkeypatch.setattr(checkpoints, "BLOCK", 2)
    monkeypatch.setattr(provenance, "LARGE", 1)
    weights = tmp_path / "LATEST" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(64 * 2 * 4))
    run_folder.write_done(tmp_path, RECORD)
    record = run_folder.finished_run(tmp_path)
    data = bytearray(weights.read_bytes())
    data[4] ^= 1
    weights.write_bytes(data)
    assert checkpoints.weights_fingerprint(str(weights.parent)) != record["weights"]
    with pytest.raises(UserError, match="LATEST does not hold the weights"):
        run_folder.check_finished(tmp_path, record)
    # As earlier versions wrote it: the fingerprint alone decides.
    del record["files"]
    with pytest.raises(UserError, match="LATEST does not hold the weights"):
        run_folder.check_finished(tmp_path, record)
    record["weights"] = checkpoints.earlier_fingerprint(str(weights.parent))
    run_folder.check_finished(tmp_path, record)
