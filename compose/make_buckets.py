"""Make the buckets that are named, where the S3 server does not have them yet."""

from __future__ import annotations

import sys

import botocore.session
from botocore.exceptions import ClientError

client = botocore.session.get_session().create_client("s3")
for bucket in sys.argv[1:]:
    try:
        client.create_bucket(Bucket=bucket)
        print(f"made {bucket}")
    except ClientError as error:
        if error.response["Error"]["Code"] not in (
            "BucketAlreadyOwnedByYou",
            "BucketAlreadyExists",
        ):
            raise
        print(f"{bucket} is there")
