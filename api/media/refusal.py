"""Why a piece of media cannot be used, in words that may be shown to the client."""

from __future__ import annotations


class MediaRefusal(Exception):
    """Completes the sentence "The image ..." or "The video ..."; names no path, address or library."""
