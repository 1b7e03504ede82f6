"""How anything finds a local S3 server."""

from __future__ import annotations

from typing import Any

import boto3


def s3_environment(port: int) -> dict[str, str]:
    """Environment of every process that is to use the server at `port`."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def s3_client(port: int) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


def create_bucket(port: int, name: str) -> None:
    s3_client(port).create_bucket(Bucket=name)
