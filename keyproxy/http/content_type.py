"""Whether all servers read content by the same type and charset.

Servers find these in Content-Type with different parsers: some decode JSON by the parameter `charset`, where UTF-7 hides
quotes, and some search the whole value for the name of a form's type.
"""

from __future__ import annotations

import re
from typing import Final

MULTIPART: Final = b"multipart/form-data"
PAIRS: Final = b"application/x-www-form-urlencoded"

_TOKEN: Final = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_MEDIA_TYPE: Final = re.compile(rb"%b/%b" % (_TOKEN, _TOKEN))
#: The only place of the word in the value, so that no parser finds another charset.
_UTF8: Final = re.compile(rb'charset="?(?:utf-8|utf8|us-ascii|ascii)"?[ \t]*(?:;|\Z)')


def is_unambiguous(content_type: bytes) -> bool:
    """Whether a Content-Type, in lower case, names one type and no charset but UTF-8. An empty one does."""
    media_type, _, parameters = content_type.partition(b";")
    media_type = media_type.strip(b" \t")
    if not media_type:
        return not parameters
    if not _MEDIA_TYPE.fullmatch(media_type):
        return False
    if media_type != MULTIPART and b"multipart" in content_type:
        return False
    if media_type != PAIRS and b"urlencoded" in content_type:
        return False
    return b"charset" not in parameters or (parameters.count(b"charset") == 1 and _UTF8.search(parameters) is not None)
