"""What may stand as ``checkpoint.mirror``; what is secret in it is not repeated."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayalign.config.training import CheckpointConfig


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket",
        "s3://bucket/a/b",
        "gs://bucket/a",
        "file:///mnt/copies",
        "s3://bucket/a?region=eu-west-1&scheme=http&endpoint_override=minio:9000",
    ],
)
def test_legal(address: str) -> None:
    assert CheckpointConfig(mirror=address).mirror == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("runs/copies", "unsupported address; write s3://bucket/folder"),
        ("http://host/copies", "unsupported address"),
        ("s3://planted@bucket/a", "carries a user or a key; leave it out: credentials come from the environment"),
        ("s3://planted:planted@bucket/a", "carries a user or a key"),
        ("s3://bucket/a?secret_key=planted", "s3:// may have endpoint_override, region, scheme; remove the rest"),
        ("file:///mnt/a?region=planted", "file:// may have nothing; remove the rest"),
        ("s3://bucket/a#planted", "remove the rest"),
        ("s3:///a", "names no folder"),
        ("file://host/a", "names no folder"),
        ("file:///", "names no folder"),
        ("s3://bucket/a/../../other", "leads out of its own folder"),
    ],
)
def test_refused(address: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CheckpointConfig(mirror=address)
    [error] = caught.value.errors()
    assert reason in error["msg"] and "planted" not in error["msg"]
