"""Find the one key of a request. Takes plaintext, returns a digest, and nothing else leaves this module.

A key is `Authorization: Api-Key <KEY>` (scheme in any case), `Authorization: Bearer <KEY>` or `X-Api-Key: <KEY>`. The
same key given twice is one credential; two different ones are refused, because two servers could disagree on which of
them counts. A key in the URL is refused even if a header has another one: everything that the request passed through has
already logged the URL.

Whether the key exists is not decided here. `checked` refuses a key that cannot exist, without a lookup; it is called
only for a digest that is not in the cache, so that a known key costs one hash. The digest is stored in the head, so that
identical bytes on the same connection cost none.

The key is not forwarded in any other field either, whatever its name: a client library may also send it as `Api-Key`,
in a cookie or in a Referer. Such a line is dropped, and has no effect. Agent tokens are keys here: a line is dropped if
it contains the signature, because tokens have their header in common. If the key is in Host or Content-Type, without
which the request would be another one, the request is refused. On a public route no credential is checked, and the
value of each counts as a key.

An OAuth access token is a key only as `Authorization: Bearer` (RFC 6750 section 2.1). Under another scheme it is refused
without a lookup, as are refresh tokens and client secrets, which are credentials for the authorization server only.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from keyproxy.auth import agent_token_format
from keyproxy.auth.api_key import CHECKSUM_DIGITS, RANDOM_DIGITS, KeyFormat, SecretKey, digest_of
from keyproxy.http_messages import CredentialField, RequestFields, RequestHead, RequestLine
from keyproxy.model import KeyDigest
from keyproxy.reasons import Reason, Refusal

#: Query parameters with a value that is always a credential. Compared in lower case, with `-` for `_`.
_KEY_PARAMETERS: Final = frozenset({b"api-key", b"apikey", b"x-api-key", b"access-token"})

_DECODINGS_MAX: Final = 8

_ESCAPE = re.compile(rb"%[0-9a-f]{2}", re.IGNORECASE)
_WORD = re.compile(rb"[0-9A-Za-z]+")
_BASIC = re.compile(rb"basic +([0-9A-Za-z+/]+)", re.IGNORECASE)

#: A word of a key of this length is found anywhere; a shorter key only as a separate word.
_WORD_BYTES_MIN: Final = 16
_LONG_WORD = re.compile(rb"[0-9A-Za-z]{%d,}" % _WORD_BYTES_MIN)

#: Fields that determine what the request is. It is refused if the key is in one.
_NEEDED_FIELDS: Final = frozenset({b"host", b"content-type"})

#: Contains only digits.
_LENGTH: Final = b"content-length"

_BEARER: Final = b"bearer"
_SCHEMES: Final = (b"api-key", _BEARER)
#: How clients nearly always write the schemes. Any other spelling is parsed.
_USUAL_API_KEY: Final = b"Api-Key "
_USUAL_BEARER: Final = b"Bearer "
_SPACE: Final = 0x20
_TAB: Final = 0x09
_UNDERSCORE: Final = 0x5F
_OUR_SCHEME = re.compile(rb"(?:api-key|bearer)(?:[ \t]|$)", re.IGNORECASE)


def digest(head: RequestHead, key_format: KeyFormat) -> KeyDigest:
    """The digest of the request's one key.

    Raises a Refusal for no key, several keys, a key in the URL, or a secret of OAuth that is no credential here.
    """
    if head.line.holds_key:
        raise Refusal(Reason.KEY_IN_URL)
    found = head.digest
    if found is None:
        plaintext = _presented(head)
        head.key_part = _part(plaintext)
        if key_format.is_of_oauth(plaintext):
            _check_access_token(head, plaintext, key_format)
        found = head.digest = digest_of(plaintext)
    if not head.is_free_of_key:
        _take_out(head, head.key_part)
    return found


def discard(head: RequestHead) -> None:
    """Drop every line that contains a credential, for a public route. Raises a Refusal like `digest`, for the URL."""
    if head.line.holds_key:
        raise Refusal(Reason.KEY_IN_URL)
    if head.is_free_of_key:
        return
    for field in head.credentials:
        after_scheme = b"" if field.name == b"x-api-key" else field.value.partition(b" ")[2].strip()
        part = _part(after_scheme or field.value)
        if len(part) >= _WORD_BYTES_MIN:
            _take_out(head, part)
    head.is_free_of_key = True


def checked(head: RequestHead, key_format: KeyFormat) -> SecretKey:
    """The one key or token of a request, for the lookup of an unknown digest. Raises a Refusal for one that cannot exist:
    an agent token has the form of a JSON Web Token."""
    plaintext = _presented(head)
    if key_format.is_of_oauth(plaintext):
        _check_access_token(head, plaintext, key_format)
        may_exist = key_format.may_be_access_token(plaintext)
    else:
        may_exist = key_format.may_exist(plaintext) or agent_token_format.is_jwt(plaintext)
    if not may_exist:
        raise Refusal(Reason.KEY_INVALID, "malformed, or wrong checksum")
    return SecretKey(plaintext)


def has_access_token(head: RequestHead, key_format: KeyFormat) -> bool:
    """Whether the one key of a request, which was found before, is an OAuth access token."""
    for field in head.credentials:
        if key_format.may_contain_access_token(field.value):
            break
    else:
        return False
    return key_format.begins_as_access_token(_presented(head))


def shows_key(head: RequestHead, text: bytes, key_format: KeyFormat) -> bool:
    """Whether a text contains the key of the request or any key in our format, in plain or as a password of Basic
    authentication."""
    if key_format.is_within(text) or any(key_format.is_within(decoded) for decoded in _basic_passwords(text)):
        return True
    return bool(head.key_part) and _stands_in(text, head.key_part)


def _presented(head: RequestHead) -> bytes:
    """The plaintext of the one key. Raises a Refusal."""
    credentials = head.credentials
    if len(credentials) == 1:
        only = credentials[0]
        return _plaintext(only.name, only.value)
    if not credentials:
        raise Refusal(Reason.KEY_MISSING)
    return _the_same(credentials)


def _check_access_token(head: RequestHead, plaintext: bytes, key_format: KeyFormat) -> None:
    """Raise a Refusal for a secret of OAuth, unless it is an access token that is presented as one everywhere."""
    if not key_format.accepts_access_tokens:
        raise Refusal(Reason.KEY_INVALID, "OAuth is not configured")
    if not key_format.begins_as_access_token(plaintext):
        raise Refusal(Reason.KEY_INVALID, "a refresh token or client secret, which no route accepts")
    for field in head.credentials:
        if field.name == b"x-api-key" or field.value[: len(_BEARER)].lower() != _BEARER:
            raise Refusal(Reason.KEY_INVALID, "an access token outside 'Authorization: Bearer'")


def _plaintext(name: bytes, value: bytes) -> bytes:
    if name == b"x-api-key":
        if not value:
            raise Refusal(Reason.KEY_INVALID, "X-Api-Key is empty")
        return value
    usual = b""
    if value.startswith(_USUAL_API_KEY):
        usual = value[len(_USUAL_API_KEY) :]
    elif value.startswith(_USUAL_BEARER):
        usual = value[len(_USUAL_BEARER) :]
    # A byte as an integer is looked for in a quarter of the time that `find` takes.
    if usual and _SPACE not in usual and _TAB not in usual:
        return usual
    scheme, _, after = value.partition(b" ")
    if scheme.lower() in _SCHEMES:
        key = after.lstrip(b" ")
        if key and key.find(b" ") < 0 and key.find(b"\t") < 0:
            return key
    if _OUR_SCHEME.match(value):
        raise Refusal(Reason.KEY_INVALID, "the Authorization header contains no key, or more than a key")
    raise Refusal(Reason.KEY_MISSING, "the Authorization header has another scheme")


def _the_same(credentials: tuple[CredentialField, ...]) -> bytes:
    try:
        first, *others = (_plaintext(one.name, one.value) for one in credentials)
    except Refusal:
        raise Refusal(Reason.CREDENTIALS_AMBIGUOUS, "several credentials, not all of them keys") from None
    if any(other != first for other in others):
        raise Refusal(Reason.CREDENTIALS_AMBIGUOUS, f"{len(credentials)} different credentials")
    return first


def _part(plaintext: bytes) -> bytes:
    """The search pattern for a key: its longest word, which URL encoding does not change; of a JSON Web Token, that of
    its signature."""
    signature = agent_token_format.signature_of(plaintext)
    if len(signature) >= _WORD_BYTES_MIN:
        # Random throughout, so that any word of it is as good as the longest, and any long part of a word.
        part = signature[:_WORD_BYTES_MIN]
        if part.isalnum():
            return part
        random = _LONG_WORD.search(signature)
        return signature if random is None else random[0]
    # The digits of our own keys: longer than all that precedes them. An expression takes ten times as long.
    at = len(plaintext) - RANDOM_DIGITS - CHECKSUM_DIGITS
    if at <= 0 or plaintext[at - 1] != _UNDERSCORE:
        at = plaintext.rfind(b"_") + 1
    word = plaintext[at:]
    if 2 * len(word) <= len(plaintext) or not word.isalnum():
        word = max(_WORD.findall(plaintext), key=len, default=b"")
    return word if len(word) >= _WORD_BYTES_MIN else plaintext


def _take_out(head: RequestHead, part: bytes) -> None:
    """Drop every line that contains the key. Raises a Refusal if a line with the key cannot be dropped."""
    block, target = head.block, head.line.target
    # `find` takes less than half the time of `in`, which first tries its operand as an integer.
    if len(part) <= len(target) and target.find(part) >= 0 and _stands_in(target, part):
        # A foreign key, which cannot be recognised in the target by its format.
        line = head.line
        head.line = RequestLine(line.method, line.target, line.path, line.minor_version, line.start, holds_key=True)
        raise Refusal(Reason.KEY_IN_URL)
    if block.find(part) >= 0 or block.find(b"asic ") >= 0:
        head.block = _without(block, part)
        if len(head.block) < len(block):
            head.fields = _fields_of(head.block, head.fields)
    if head.forwarded:
        head.forwarded = tuple([(name, value) for name, value in head.forwarded if not _stands_in(value, part)])
    head.is_free_of_key = True


def _without(block: bytes, part: bytes) -> bytes:
    kept = b""
    for line in block.splitlines(keepends=True):
        name = line.partition(b":")[0].lower()
        if name == _LENGTH or not _stands_in(line, part):
            kept += line
        elif name in _NEEDED_FIELDS:
            raise Refusal(Reason.REQUEST_MALFORMED, "the key is in Host or Content-Type")
    return kept


def _fields_of(block: bytes, fields: RequestFields) -> RequestFields:
    """The fields, without the effect of lines that were dropped."""
    kept = [line.partition(b":") for line in block.lower().splitlines()]
    names = [name for name, _, _ in kept]
    return dataclasses.replace(
        fields,
        codings=tuple([value.strip() for name, _, value in kept if name == b"content-encoding"]),
        has_idempotency_key=names.count(b"idempotency-key") == 1,
        has_traceparent=names.count(b"traceparent") == 1,
        accepts_codings=b"accept-encoding" in names,
    )


def _stands_in(text: bytes, part: bytes) -> bool:
    """Whether a text contains the key: verbatim, or as a password of Basic authentication."""
    if part in text:
        if len(part) >= _WORD_BYTES_MIN:
            return True
        alone = rb"(?<![0-9A-Za-z])%b(?![0-9A-Za-z])" % re.escape(part)
        if re.search(alone, text):
            return True
    return any(part in decoded for decoded in _basic_passwords(text))


def _basic_passwords(text: bytes) -> list[bytes]:
    """What a text contains as credentials of Basic authentication, decoded."""
    found = []
    for encoded in _BASIC.findall(text):
        whole = encoded[: len(encoded) - len(encoded) % 4] if len(encoded) % 4 == 1 else encoded
        try:
            decoded = base64.b64decode(whole + b"=" * (-len(whole) % 4))
        except binascii.Error:
            continue
        found.append(decoded)
    return found


def holds_key(target: bytes, key_format: KeyFormat) -> bool:
    """Whether a request target contains a key, or a parameter for one. Its path may be decoded already."""
    if target.find(b"?") < 0 and target.find(b"%") < 0:
        return key_format.is_within(target)
    # Decode repeatedly: template engines and redirects may have encoded a key several times.
    decoded = target
    for _ in range(_DECODINGS_MAX):
        if not _ESCAPE.search(decoded):
            break
        decoded = unquote_to_bytes(decoded)
    else:
        return True  # so many levels of encoding can only serve to hide something
    if key_format.is_within(decoded):
        return True
    for parameter in decoded.partition(b"?")[2].replace(b";", b"&").split(b"&"):
        name, _, value = parameter.partition(b"=")
        if value and name.lower().replace(b"_", b"-") in _KEY_PARAMETERS:
            return True
    return False
