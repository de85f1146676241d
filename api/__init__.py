"""The api: HTTP in, tokens out; text and media are prepared here."""
