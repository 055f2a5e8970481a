"""Parses the requests and renders the answers of each API dialect: OpenAI's, Anthropic's, SGLang's."""
