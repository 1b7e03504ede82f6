"""A certificate authority for one test, and what it has signed."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ray.util import get_node_ip_address


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
    )


def write_certificates(folder: Path) -> dict[str, str]:
    """Write an authority and a node's certificate for this machine below `folder`.

    Returns:
        The environment with which Ray uses them.
    """
    authority, node = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    signed_itself = (
        _builder("authority", "authority", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority, hashes.SHA256())
    )
    # A node calls itself by the address of its network, whatever address it listens on.
    ips = dict.fromkeys(("127.0.0.1", get_node_ip_address()))
    addresses = [*(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips), x509.DNSName("localhost")]
    signed = (
        _builder("node", "authority", node)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(authority, hashes.SHA256())
    )
    key = node.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder.mkdir(parents=True)
    contents = {
        "RAY_TLS_CA_CERT": signed_itself.public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_CERT": signed.public_bytes(serialization.Encoding.PEM),
        "RAY_TLS_SERVER_KEY": key,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {"RAY_USE_TLS": "1", **{name: str(folder / name) for name in contents}}
