#!/usr/bin/python3
"""Open sealed readings with none of Edgekeep's code.

    open_record.py CHUNK_FILES_OR_DIRECTORIES --release FILE --key consumer.key
                   [--epoch-key FILE] [--roots roots.cbor]

Written from docs/protocol.md alone (its sections are named below), with cbor2,
cryptography and the zstd program. CHUNK files hold one chunk each, --release
files one answer of the key broker, as it came. Both may be given several times,
like --epoch-key, a COSE_Key that is trusted.

Who vouches for the epoch key under which the data are checked: --epoch-key, or
with --roots the verifier's verdict in the release. With neither, the release is
believed, and a line on stderr says so.

Prints one JSON object a line for each reading. Exits with 1 at the first thing
that does not verify, and with 2 when all verifies but something is missing.
"""
import argparse
import base64
import hashlib
import hmac
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile

import cbor2
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

MAX_CBOR, MAX_CHUNK, MAX_CONTENT = 1 << 20, 122880, 1 << 20
SUBJECT, STREAM, EPOCH, SEQ, PREV, BEFORE, ENCODING = range(-70300, -70307, -1)


class Refused(Exception):
    pass


def need(condition, what):
    if not condition:
        raise Refused(what)


# §1 CBOR: the one spelling of everything.

def walk(b, at, depth):
    """Passes one item and returns where it ends."""
    need(depth <= 16 and at < len(b), "cbor: too deep or cut short")
    major, info = b[at] >> 5, b[at] & 31
    at += 1
    need(info < 28, "cbor: indefinite length")
    arg = info
    if info >= 24:
        size = 1 << (info - 24)
        need(at + size <= len(b), "cbor: cut short")
        raw, at = b[at:at + size], at + size
        arg = int.from_bytes(raw, "big")
        if major == 7:
            canonical_simple(size, raw, arg)
        else:
            need(arg >= (24, 1 << 8, 1 << 16, 1 << 32)[info - 24], "cbor: number not in its shortest form")
    if major in (2, 3):
        need(at + arg <= len(b), "cbor: cut short")
        if major == 3:
            b[at:at + arg].decode("utf-8")
        at += arg
    elif major == 4:
        need(arg <= 16384, "cbor: array too long")
        for _ in range(arg):
            at = walk(b, at, depth + 1)
    elif major == 5:
        need(arg <= 4096, "cbor: map too long")
        last = None
        for _ in range(arg):
            end = walk(b, at, depth + 1)
            need(last is None or last < b[at:end], "cbor: map keys do not ascend")
            last, at = b[at:end], walk(b, end, depth + 1)
    elif major == 6:
        need(arg == 4, "cbor: a tag that no message here has")
        at = walk(b, at, depth + 1)
    return at


def canonical_simple(size, raw, arg):
    if size == 1:
        need(arg >= 32, "cbor: simple value not in its shortest form")
        return
    value = struct.unpack({2: ">e", 4: ">f", 8: ">d"}[size], raw)[0]
    need(shortest_float(value) == raw, "cbor: float not in its shortest form")


def shortest_float(value):
    if math.isnan(value):
        return b"\x7e\x00"
    for kind in (">e", ">f"):
        try:
            raw = struct.pack(kind, value)
        except OverflowError:
            continue
        if struct.unpack(kind, raw)[0] == value:
            return raw
    return struct.pack(">d", value)


def decode(b):
    need(len(b) <= MAX_CBOR, "cbor: too long")
    try:
        need(walk(b, 0, 0) == len(b), "cbor: bytes after the end")
        return cbor2.loads(b)
    except (UnicodeDecodeError, cbor2.CBORDecodeError) as e:
        raise Refused("cbor: %s" % e)


def fields(m, what, required, optional=()):
    need(isinstance(m, dict) and set(required) <= set(m) <= set(required) | set(optional), what + ": not its fields")
    return m


def is_bytes(v, size=None):
    return isinstance(v, bytes) and (size is None or len(v) == size)


def is_uint(v):
    return isinstance(v, int) and not isinstance(v, bool) and v >= 0


def sha256(b):
    return hashlib.sha256(b).digest()


# §2 COSE

def tagged(msg, prefix, parts, what):
    """Takes a message apart: its tag, then an array of so many parts."""
    need(msg.startswith(prefix), what + ": not such a message")
    body = msg[len(prefix) - 1:]  # the head of the array is the prefix's last byte
    m = decode(body)
    need(isinstance(m, list) and len(m) == parts, what + ": not its parts")
    return m


def thumbprint(key):
    return sha256(cbor2.dumps({1: 2, -1: 1, -2: key[-2], -3: key[-3]}))


def ec2(key, alg=None):
    """A COSE_Key of P-256, as public key and key id."""
    want = {1: 2, -1: 1, **({3: alg} if alg else {})}
    fields(key, "key", [*want, -2, -3])
    need(all(key[k] == v for k, v in want.items()) and is_bytes(key[-2], 32) and is_bytes(key[-3], 32), "key: not P-256")
    try:
        pub = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key[-2] + key[-3])
    except ValueError:
        raise Refused("key: not on the curve")
    return pub, thumbprint(key)


def verify1(msg, key, typ):
    """The payload of a COSE_Sign1 by this key with this typ."""
    pub, kid = key
    protected, unprotected, payload, signature = tagged(msg, b"\xd2\x84", 4, typ)
    need(is_bytes(protected) and unprotected == {} and is_bytes(payload) and is_bytes(signature, 64), typ + ": malformed")
    need(decode(protected) == {1: -7, 4: kid, 16: typ}, typ + ": not of this type, or not by this key")
    tbs = cbor2.dumps(["Signature1", protected, b"", payload])
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        pub.verify(utils.encode_dss_signature(r, s), tbs, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Refused(typ + ": the signature does not verify")
    return payload


def gcm_open(key, nonce, ciphertext, aad, what):
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, aad)
    except InvalidTag:
        raise Refused(what + ": does not open")


# §3 HPKE, DHKEM(P-256, HKDF-SHA256), HKDF-SHA256, AES-128-GCM, base mode

def extract(suite, salt, label, ikm):
    return hmac.new(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, hashlib.sha256).digest()


def expand(suite, prk, label, info, size):
    info = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(hashes.SHA256(), size, info).derive(prk)


def hpke_open(private, enc, info, sealed):
    public = private.public_key().public_numbers()
    pk = b"\x04" + public.x.to_bytes(32, "big") + public.y.to_bytes(32, "big")
    try:
        peer = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), enc)
    except ValueError:
        raise Refused("ek: not on the curve")
    kem, suite = b"KEM\x00\x10", b"HPKE\x00\x10\x00\x01\x00\x01"
    prk = extract(kem, b"", b"eae_prk", private.exchange(ec.ECDH(), peer))
    shared = expand(kem, prk, b"shared_secret", enc + pk, 32)
    context = b"\x00" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    secret = extract(suite, shared, b"secret", b"")
    key = expand(suite, secret, b"key", context, 16)
    nonce = expand(suite, secret, b"base_nonce", context, 12)
    return gcm_open(key, nonce, sealed, b"", "content key")


def open_encrypt(msg, private):
    """The protected header and the plaintext of a COSE_Encrypt for this key."""
    protected, unprotected, ciphertext, recipients = tagged(msg, b"\xd8\x60\x84", 4, "COSE_Encrypt")
    need(is_bytes(protected) and isinstance(unprotected, dict) and list(unprotected) == [5] and is_bytes(unprotected[5], 12)
         and is_bytes(ciphertext) and isinstance(recipients, list) and 1 <= len(recipients) <= 16, "COSE_Encrypt: malformed")
    n = private.public_key().public_numbers()
    kid = thumbprint({-2: n.x.to_bytes(32, "big"), -3: n.y.to_bytes(32, "big")})
    for r in recipients:
        need(isinstance(r, list) and len(r) == 3 and all(is_bytes(r[i]) for i in (0, 2)), "recipient: malformed")
        if decode(r[0]) != {1: 35, 4: kid}:
            continue
        need(isinstance(r[1], dict) and list(r[1]) == [-4] and is_bytes(r[1][-4], 65) and len(r[2]) == 48, "recipient: malformed")
        cek = hpke_open(private, r[1][-4], cbor2.dumps(["HPKE Recipient", 3, r[0], b""]), r[2])
        aad = cbor2.dumps(["Encrypt", protected, b""])
        return decode(protected), gcm_open(cek, unprotected[5], ciphertext, aad, "COSE_Encrypt")
    raise Refused("it is sealed to other keys than this one")


# §17 files

def read_private(path):
    with open(path) as f:
        m = re.search(r"-----BEGIN (.+?)-----(.+?)-----END \1-----", f.read(), re.S)
    need(m and m[1] == "EDGEKEEP HPKE P-256 PRIVATE KEY", path + ": not a P-256 HPKE key")
    raw = base64.b64decode(m[2])
    need(len(raw) == 32, path + ": not 32 bytes")
    return ec.derive_private_key(int.from_bytes(raw, "big"), ec.SECP256R1())


def read_file(path):
    with open(path, "rb") as f:
        return f.read()


# §10, §14 releases: who vouches for an epoch key, and the stream key

def vouched_by_verdict(roots, release):
    """Checks that an affirming verdict vouches for the release's epoch key, and
    returns whom it is about."""
    v = decode(verify1(release[3], ec2(roots[3]), "application/ear+cwt"))
    need(v[265] == "tag:ietf.org,2026:rats/ear#04" and list(v[266]) == ["gateway"], "verdict: not of this profile")
    appraisal = v[266]["gateway"]
    need(all(2 <= c <= 31 or -32 <= c <= -2 for c in appraisal[1001].values() if c not in (-1, 0, 1)) and appraisal[1000] == 2,
         "verdict: not affirming")
    need(v[3] == roots[1], "verdict: for another tenant")
    need(decode(release[2]) in [v[8][1], *v.get(-70204, [])], "verdict: does not vouch for the epoch key")
    return v[2]


def open_release(path, private, roots, trusted):
    """((subject, stream, epoch), (stream key, epoch key))"""
    release = fields(decode(read_file(path)), "release", [1, 2, 3])
    epoch_key = ec2(decode(release[2]))
    if trusted:
        need(epoch_key[1] in trusted, "release: its epoch key is not the one given")
    if roots:
        subject = vouched_by_verdict(roots, release)
        sealed = verify1(release[1], ec2(roots[5]), "application/edgekeep-release+cose")
    else:
        sealed = tagged(release[1], b"\xd2\x84", 4, "release")[2]
    header, plain = open_encrypt(sealed, private)
    fields(header, "key header", [1, SUBJECT, STREAM, EPOCH])
    need(header[1] == 3 and is_bytes(header[EPOCH], 16), "key header: not of this profile")
    need(not roots or subject == header[SUBJECT], "release: the verdict is about another gateway")
    key = fields(decode(plain), "stream key", [1, 3, -1])
    need(key[1] == 4 and key[3] == 3 and is_bytes(key[-1], 32), "stream key: not an A256GCM key")
    return (header[SUBJECT], header[STREAM], header[EPOCH]), (key[-1], epoch_key)


# §11 chunks, checkpoints, records

class Chunk:
    """A chunk whose shape is checked, but no signature."""

    def __init__(self, path):
        self.path, b = path, read_file(path)
        need(len(b) <= MAX_CHUNK, "chunk: too long")
        c = decode(b)
        need(isinstance(c, list) and len(c) == 3 and isinstance(c[1], list) and c[1], "chunk: malformed")
        self.key, self.records, self.checkpoint = c
        need(is_bytes(self.key) and is_bytes(self.checkpoint) and all(map(is_bytes, self.records)), "chunk: malformed")
        p = fields(decode(tagged(self.checkpoint, b"\xd2\x84", 4, "checkpoint")[2]), "checkpoint", [1, 2, 3, 4, 5], [6])
        need(is_bytes(p[3], 16) and is_uint(p[4]) and is_bytes(p[5], 32), "checkpoint: malformed")
        self.id, self.seq, self.head = (p[1], p[2], p[3]), p[4], p[5]
        self.headers = [record_header(r) for r in self.records]
        for i, h in enumerate(self.headers):
            need((h[STREAM], h[EPOCH]) == self.id[1:], "record: of another stream or epoch than the checkpoint")
            if i:
                need(h[SEQ] == self.headers[i - 1][SEQ] + 1 and h[PREV] == sha256(self.records[i - 1]), "record: does not follow")
        self.first = self.headers[0]
        need(self.headers[-1][SEQ] == self.seq and sha256(self.records[-1]) == self.head, "checkpoint: not of the last record")
        need(bool(self.key) == (self.first[SEQ] == 0), "chunk: the stream key comes with record 0, and only there")

    def readings(self, stream_key, epoch_key):
        payload = verify1(self.checkpoint, epoch_key, "application/edgekeep-checkpoint+cbor")
        need(decode(payload)[5] == self.head, "checkpoint: malformed")
        if self.key:
            enc = verify1(self.key, epoch_key, "application/edgekeep-stream-key+cose")
            h = decode(tagged(enc, b"\xd8\x60\x84", 4, "stream key")[0])
            need(h == {1: 3, SUBJECT: self.id[0], STREAM: self.id[1], EPOCH: self.id[2]}, "stream key: of another stream")
        for record, h in zip(self.records, self.headers):
            protected, _, ciphertext = tagged(record, b"\xd0\x83", 3, "record")
            aad = cbor2.dumps(["Encrypt0", protected, b""])
            content = gcm_open(stream_key, h[5], ciphertext, aad, "record %d" % h[SEQ])
            if ENCODING in h:
                content = unzstd(content)
            for name, unit, time, value in senml(content):
                yield {"subject": self.id[0], "stream": self.id[1], "epoch": self.id[2].hex(), "seq": h[SEQ],
                       "name": name, "unit": unit, "time": time, "value": value}


def record_header(record):
    protected, unprotected, ciphertext = tagged(record, b"\xd0\x83", 3, "record")
    need(is_bytes(protected) and unprotected == {} and is_bytes(ciphertext) and len(ciphertext) >= 16, "record: malformed")
    h = fields(decode(protected), "record header", [1, 3, 5, STREAM, EPOCH, SEQ, PREV], [BEFORE, ENCODING])
    need(h[1] == 3 and h[3] == 112 and is_uint(h[SEQ]) and h[5] == bytes(4) + h[SEQ].to_bytes(8, "big")
         and is_bytes(h[EPOCH], 16) and is_bytes(h[PREV], 32) and h.get(ENCODING, "zstd") == "zstd", "record header: not of this profile")
    need(h[SEQ] > 0 or h[PREV] == bytes(32), "record header: record 0 names one before it")
    if BEFORE in h:
        b = h[BEFORE]
        need(h[SEQ] == 0 and isinstance(b, list) and len(b) == 3 and is_bytes(b[0], 16) and is_uint(b[1])
             and is_bytes(b[2]) and len(b[2]) in (0, 32), "record header: malformed")
    return h


def unzstd(content):
    with tempfile.TemporaryFile() as f:
        f.write(content)
        f.seek(0)
        p = subprocess.Popen(["zstd", "-q", "-d", "-c"], stdin=f, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        out = p.stdout.read(MAX_CONTENT + 1)
        if len(out) > MAX_CONTENT:
            p.kill()
        need(p.wait() == 0, "content: not zstd, or too long")
    return out


# §12 SenML

def senml(content):
    pack = decode(content)
    need(isinstance(pack, list), "senml: not a pack")
    base = time = None
    for m in pack:
        fields(m, "senml", [], [-2, -3, 0, 1, 2, 3, 4])
        need((-2 in m) == (-3 in m) and (time is not None or -3 in m), "senml: base name and time missing")
        if -3 in m:
            # cbor2 makes a Decimal of tag 4, whose exponent is that of the fraction
            t = m[-3].as_tuple()
            need(t.exponent == -9, "senml: the time is not in nanoseconds")
            base, time = m[-2], (-1 if t.sign else 1) * int("".join(map(str, t.digits)))
        values = [k for k in (2, 3, 4) if k in m]
        need(len(values) == 1, "senml: not exactly one value")
        kind, v = values[0], m[values[0]]
        need(kind == 3 and isinstance(v, str) or kind == 4 and isinstance(v, bool)
             or kind == 2 and is_number(v), "senml: value of a wrong type")
        yield base + m.get(0, ""), m.get(1, ""), time, v


def is_number(v):
    if isinstance(v, float):
        return math.isfinite(v)
    return isinstance(v, int) and not isinstance(v, bool) and -1 << 63 <= v < 1 << 64


def follows(last, chunk):
    """What a consumer has to tell (§14): is anything missing before this chunk?"""
    first = chunk.first
    if last is None:
        return None if first[SEQ] == 0 and BEFORE not in first else "the stream began before it"
    if last.id == chunk.id:
        same = first[SEQ] == last.seq + 1 and first[PREV] == last.head
        return None if same else "record %d does not follow record %d" % (first[SEQ], last.seq)
    same = first.get(BEFORE) == [last.id[2], last.seq + 1, last.head]
    return None if same else "its epoch does not follow the one before"


def main():
    p = argparse.ArgumentParser(description="Open sealed readings.")
    p.add_argument("chunks", nargs="+")
    p.add_argument("--release", action="append", required=True)
    p.add_argument("--key", required=True)
    p.add_argument("--epoch-key", action="append", default=[])
    p.add_argument("--roots")
    a = p.parse_args()
    private = read_private(a.key)
    roots = fields(decode(read_file(a.roots)), "roots", range(1, 8)) if a.roots else None
    trusted = {ec2(decode(read_file(f)))[1] for f in a.epoch_key}
    if not roots and not trusted:
        print("nobody vouches for the epoch key: give --roots or --epoch-key", file=sys.stderr)
    keys = dict(open_release(f, private, roots, trusted) for f in a.release)
    paths = []
    for c in a.chunks:
        paths += [os.path.join(c, n) for n in sorted(os.listdir(c))] if os.path.isdir(c) else [c]
    chunks = sorted((Chunk(f) for f in paths), key=lambda c: (c.id, c.first[SEQ]))
    last, gaps = {}, 0
    for c in chunks:
        need(c.id in keys, "%s: no release is for its stream and epoch" % c.path)
        gap = follows(last.get(c.id[:2]), c)
        if gap:
            gaps += 1
            print("%s: something is missing: %s" % (c.path, gap), file=sys.stderr)
        for r in c.readings(*keys[c.id]):
            print(json.dumps(r, ensure_ascii=False))
        last[c.id[:2]] = c
    return 2 if gaps else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Refused, OSError) as e:
        print("refused: %s" % e, file=sys.stderr)
        sys.exit(1)
