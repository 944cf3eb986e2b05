"""The digest of a profile's content."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(content: dict[str, Any]) -> str:
    """``sha256:...`` of a profile's content without its digest field, as JSON with sorted keys and no white space.

    It does not use the file's own form, because Python indents JSON slowly and every load computes this.
    """
    body = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
