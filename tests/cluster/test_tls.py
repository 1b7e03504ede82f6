"""Ray with TLS: nodes and drivers that the authority has signed talk, others are turned away."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.certificates import write_certificates
from tests.cluster.raylets import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_DRIVER = """
import ray
ray.init(address="{address}", logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=0.1, label_selector={{"afmrl/role": "reward"}})
def on_the_worker():
    return "done on " + ray.get_runtime_context().get_node_labels()["afmrl/role"]

print(ray.get(on_the_worker.remote()))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("tls")
    cluster = Cluster(folder, write_certificates(folder / "signed"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def drive(cluster: Cluster, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _DRIVER.format(address=cluster.gcs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def greeting(cluster: Cluster, context: ssl.SSLContext) -> bytes:
    """The first bytes that the GCS says after a handshake; none where it hangs up."""
    host, port = cluster.gcs.split(":")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), timeout=60) as bare:
        try:
            with context.wrap_socket(bare, server_hostname=host) as wrapped:
                return wrapped.recv(9)
        except ssl.SSLCertVerificationError:
            raise
        except (ssl.SSLError, ConnectionError):
            return b""


def test_a_driver_with_the_certificates_runs_a_task_on_the_other_node(cluster: Cluster) -> None:
    done = drive(cluster, cluster.environment)
    assert done.stdout.strip() == "done on reward", done.stderr[-2000:]


def test_a_driver_without_tls_is_turned_away(cluster: Cluster) -> None:
    bare = {name: value for name, value in cluster.environment.items() if not name.startswith(("RAY_TLS", "RAY_USE"))}
    done = drive(cluster, {**bare, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"})
    assert done.returncode != 0
    assert "done on" not in done.stdout


def test_a_driver_of_another_authority_is_turned_away(cluster: Cluster, tmp_path: Path) -> None:
    stranger = {**cluster.environment, **write_certificates(tmp_path / "other")}
    done = drive(cluster, {**stranger, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"})
    assert done.returncode != 0
    assert "done on" not in done.stdout


def test_the_port_shows_the_signed_certificate_and_wants_one(cluster: Cluster) -> None:
    signed = cluster.environment
    known = ssl.create_default_context(cafile=signed["RAY_TLS_CA_CERT"])
    known.load_cert_chain(signed["RAY_TLS_SERVER_CERT"], signed["RAY_TLS_SERVER_KEY"])
    assert greeting(cluster, known)[3:4] == b"\x04", "no SETTINGS frame of HTTP/2"
    assert not greeting(cluster, ssl.create_default_context(cafile=signed["RAY_TLS_CA_CERT"]))
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting(cluster, ssl.create_default_context())
