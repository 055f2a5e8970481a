"""The HTTP side of the facade: the only room that knows aiohttp."""
