"""What a filesystem is given for each of Airflow's connection types."""

from __future__ import annotations

import json

import pytest

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.operators.credentials import make_arguments

KEY = {"type": "service_account", "private_key": "k3y"}
CASES = {
    "s3": (
        "s3://b",
        {"conn_type": "aws", "login": "id", "password": "key"},
        {"region_name": "eu", "endpoint_url": "http://s3", "aws_session_token": "t"},
        {
            "key": "id",
            "secret": "key",
            "token": "t",
            "client_kwargs": {"region_name": "eu", "endpoint_url": "http://s3"},
        },
    ),
    "s3, all that the provider understands": (
        "s3://b",
        {"conn_type": "aws"},
        {
            "aws_access_key_id": "id",
            "aws_secret_access_key": "key",
            "session_kwargs": {"profile_name": "ml", "region_name": "eu"},
            "service_config": {"s3": {"endpoint_url": "http://s3"}},
            "verify": "False",
            "config_kwargs": {"signature_version": "unsigned", "retries": {"max_attempts": 3}},
            "s3_additional_kwargs": {"ServerSideEncryption": "AES256"},
        },
        {
            "key": "id",
            "secret": "key",
            "profile": "ml",
            "anon": True,
            "client_kwargs": {"region_name": "eu", "endpoint_url": "http://s3", "verify": False},
            "config_kwargs": {"retries": {"max_attempts": 3}},
            "s3_additional_kwargs": {"ServerSideEncryption": "AES256"},
        },
    ),
    "s3, a role": (
        "s3://b",
        {"conn_type": "aws", "login": "id", "password": "key"},
        {
            "role_arn": "arn:aws:iam::1:role/ml",
            "external_id": "x",
            "assume_role_kwargs": {"DurationSeconds": 900},
            "verify": "/etc/ca.pem",
        },
        {
            "key": "id",
            "secret": "key",
            "client_kwargs": {"verify": "/etc/ca.pem"},
            "assume_role": {
                "arguments": {
                    "RoleArn": "arn:aws:iam::1:role/ml",
                    "ExternalId": "x",
                    "DurationSeconds": 900,
                    "RoleSessionName": "Airflow_c",
                }
            },
        },
    ),
    "s3, a role that a token is good for": (
        "s3://b",
        {"conn_type": "aws"},
        {
            "role_arn": "arn:aws:iam::1:role/ml",
            "assume_role_method": "assume_role_with_web_identity",
            "assume_role_with_web_identity_federation": "file",
            "assume_role_with_web_identity_token_file": "/run/token",
        },
        {
            "assume_role": {
                "arguments": {"RoleArn": "arn:aws:iam::1:role/ml", "RoleSessionName": "Airflow_c"},
                "token_file": "/run/token",
            },
        },
    ),
    "gcs, a key": (
        "gs://b",
        {"conn_type": "google_cloud_platform"},
        {"keyfile_dict": json.dumps(KEY), "project": "p", "num_retries": 5},
        {"token": KEY, "project": "p"},
    ),
    "gcs, a key in a file, as Airflow 1 wrote it": (
        "gcs://b",
        {"conn_type": "google_cloud_platform"},
        {
            "extra__google_cloud_platform__key_path": "/keys/k.json",
            "extra__google_cloud_platform__project": "",
        },
        {"token": "/keys/k.json"},
    ),
    "gcs, nobody": (
        "gs://b",
        {"conn_type": "google_cloud_platform"},
        {"is_anonymous": True},
        {"token": "anon"},
    ),
    "azure, account and key": (
        "abfs://c",
        {"conn_type": "wasb", "login": "account", "password": "key"},
        {},
        {"account_name": "account", "account_key": "key"},
    ),
    "azure, an application": (
        "az://c",
        {
            "conn_type": "wasb",
            "host": "https://account.blob.core.windows.net",
            "login": "app",
            "password": "secret",
        },
        {"tenant_id": "t"},
        {
            "account_name": "account",
            "tenant_id": "t",
            "client_id": "app",
            "client_secret": "secret",
        },
    ),
    "azure, an application for a data lake": (
        "abfss://c",
        {"conn_type": "azure_data_lake", "login": "app", "password": "secret"},
        {"tenant": "t", "account_name": "lake"},
        {"account_name": "lake", "tenant_id": "t", "client_id": "app", "client_secret": "secret"},
    ),
    "azure, a signature": (
        "abfs://c",
        {"conn_type": "wasb", "host": "account.blob.core.windows.net"},
        {"sas_token": "sig"},
        {"account_name": "account", "sas_token": "sig"},
    ),
    "azure, a connection string": (
        "abfs://c",
        {"conn_type": "wasb"},
        {"connection_string": "AccountName=a;AccountKey=k"},
        {"connection_string": "AccountName=a;AccountKey=k"},
    ),
    "sftp": (
        "sftp://host/data",
        {"conn_type": "sftp", "host": "other", "login": "u", "password": "p", "port": 2222},
        {"key_file": "/keys/id", "no_host_key_check": "true", "conn_timeout": 10},
        {
            "username": "u",
            "password": "p",
            "port": 2222,
            "key_filename": "/keys/id",
            "timeout": 10,
        },
    ),
    "hdfs": (
        "hdfs:///data",
        {"conn_type": "hdfs", "host": "node", "login": "u", "port": 8020},
        {"kerb_ticket": "/tmp/t"},
        {"host": "node", "port": 8020, "user": "u", "kerb_ticket": "/tmp/t"},
    ),
    "webhdfs": (
        "webhdfs://node:9870/data",
        {"conn_type": "webhdfs", "login": "u", "password": "p"},
        {"use_ssl": "True"},
        {"user": "u", "password": "p", "use_https": True},
    ),
    "http": (
        "https://host",
        {"conn_type": "http", "login": "u", "password": "p"},
        {"headers": {"X-A": "1"}},
        {"client_kwargs": {"headers": {"X-A": "1", "Authorization": "Basic dTpw"}}},
    ),
    "any other": ("ftp://host", {"conn_type": "ftp"}, {"username": "u"}, {"username": "u"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_connection_becomes_the_arguments_of_the_filesystem(name):
    from airflow.sdk import Connection

    url, fields, extra, expected = CASES[name]
    connection = Connection(conn_id="c", extra=json.dumps(extra), **fields)

    assert make_arguments("lake", url, connection) == expected


def test_a_field_that_is_wrong_is_an_error_without_its_value():
    from airflow.sdk import Connection

    extra = json.dumps({"keyfile_dict": "{s3cret"})
    connection = Connection(conn_id="c", conn_type="google_cloud_platform", extra=extra)

    with pytest.raises(
        DataError, match="datastore 'lake': a field of the Airflow connection 'c'"
    ) as caught:
        make_arguments("lake", "gs://b", connection)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"role_anr": "arn"}, r"'role_anr' in its extra.* Did you mean 'role_arn'"),
        ({"session_kwargs": {"botocore": 1}}, "'botocore' in its session_kwargs"),
        (
            {"role_arn": "arn", "assume_role_method": "assume_role_with_saml"},
            "the assume_role_method 'assume_role_with_saml', and for S3 there are",
        ),
        (
            {"role_arn": "arn", "assume_role_method": "assume_role_with_web_identity"},
            "needs assume_role_with_web_identity_federation 'file'",
        ),
    ],
)
def test_what_means_nothing_to_an_s3_datastore_is_told_with_what_does(extra, told):
    from airflow.sdk import Connection

    pytest.importorskip("s3fs")
    connection = Connection(conn_id="c", conn_type="aws", extra=json.dumps(extra))

    with pytest.raises(DataError, match=told) as caught:
        make_arguments("lake", "s3://b", connection)

    assert str(caught.value).startswith("datastore 'lake': the Airflow connection 'c' has")
