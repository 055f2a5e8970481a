"""The OpenAI-compatible facade: HTTP (aiohttp), the batch socket, and the ledger of open requests."""
