"""The HTTP server of the API: the only room that imports aiohttp, except for commands/serve.py, which runs it."""
