"""Rights: who may do what, proved by shared access signatures, or by tokens that nobody reads."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote_plus

__all__ = ["Denied", "Policies"]

_SAS = "SharedAccessSignature "
ALL = frozenset({"Manage", "Send", "Listen"})


class Denied(Exception):
    """The signature or the token is no good."""


@dataclass
class Policies:
    """Shared access policies: a key for each, and its rights if it has not all."""

    keys: dict[str, str]
    rights: dict[str, frozenset[str]] = field(default_factory=dict)
    #: Take tokens of an identity (JWT), whatever they say.
    accept_tokens: bool = False

    def of_token(self, token: str) -> tuple[str, float]:
        """Return the policy that a token proves, and until when; raise `Denied` if it proves none.

        The SDK calls all its tokens "jwt", signatures too: what counts is what they look like.
        """
        if not token.startswith(_SAS):
            if not self.accept_tokens:
                raise Denied("InvalidToken: tokens of an identity are not accepted here.")
            return "", time.time() + 3600
        parts = {name: values[0] for name, values in parse_qs(token[len(_SAS) :]).items()}
        policy, until = parts.get("skn", ""), parts.get("se", "0")
        key = self.keys.get(policy)
        if key is None or not hmac.compare_digest(
            self._signature(key, parts.get("sr", ""), until), parts.get("sig", "")
        ):
            raise Denied("InvalidSignature: The token has an invalid signature.")
        if float(until) <= time.time():
            raise Denied("ExpiredToken: The token is expired.")
        return policy, float(until)

    @staticmethod
    def _signature(key: str, resource: str, until: str) -> str:
        text = f"{quote_plus(resource)}\n{until}"
        return base64.b64encode(
            hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()
        ).decode()

    def allow(self, policy: str, right: str) -> bool:
        """Return whether the policy has the right; Manage includes the others."""
        rights = self.rights.get(policy, ALL)
        return right in rights or "Manage" in rights
